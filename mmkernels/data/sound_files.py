"""Sound files as pictures of sound: log-mel spectrograms."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .extras import require
from .image_files import UnreadableError

MAX_SECONDS = 3600
MAX_SAMPLES = 2**29  # over all channels: 2 GiB as they are read


@dataclass(frozen=True)
class Spectrogram:
    """How a log-mel spectrogram is made of sound.

    Attributes:
        rate: samples a second; files with another rate are resampled.
        bands: M, mel bands from 0 to half of the rate.
        window, hop: a frame is so many seconds long, and the next begins so much later. 25 and 10 ms are usual for
            speech.
    """

    rate: int = 16_000
    bands: int = 64
    window: float = 0.025
    hop: float = 0.010

    def __post_init__(self):
        lengths = round(self.window * self.rate), round(self.hop * self.rate)
        if self.bands < 1 or min(lengths) < 1:
            raise ValueError(f"bands, and window and hop in samples, must be at least 1, got {self.bands}, {lengths}")


def read_sound(path, spectrogram=Spectrogram()):
    """A sound file (WAV, FLAC, OGG, MP3) as a log-mel spectrogram, float ``[M, F]``, of as many frames as it is long.

    Channels are averaged, then resampled (soxr). A frame is the natural logarithm of what a Hann window's power
    spectrum is in each of M triangular bands, which are equally wide on the mel scale (HTK's formula, peaks of 1), at
    least ``1e-10``: silence is -23.

    Raises:
        UnreadableError: no sound, broken, empty, not finite, or longer than an hour.
        ImportError: soundfile or soxr isn't installed.
    """
    soundfile = require("soundfile")
    try:
        with soundfile.SoundFile(str(path)) as file:
            count, channels, rate = file.frames, file.channels, file.samplerate
            if not 1000 <= rate <= 1_000_000:
                raise ValueError(f"{rate} samples a second")
            if count > MAX_SECONDS * rate or count * channels > MAX_SAMPLES:
                raise ValueError(f"longer than {MAX_SECONDS} s, or more than {MAX_SAMPLES} samples")
            samples = file.read(dtype="float32", always_2d=True)
    except Exception as error:  # as of images: any may come out of a broken file
        raise UnreadableError(f"{Path(path)} can't be read as sound: {error or type(error).__name__}") from error
    if not samples.size:
        raise UnreadableError(f"{Path(path)} is an empty sound")
    mono = samples.mean(1)
    if not require("numpy").isfinite(mono).all():
        raise UnreadableError(f"{Path(path)} holds samples that aren't finite")
    if rate != spectrogram.rate:
        mono = require("soxr").resample(mono, rate, spectrogram.rate)
    return log_mel(torch.from_numpy(mono), spectrogram)


def log_mel(samples, spectrogram=Spectrogram()):
    """Samples float ``[S]`` -> float ``[M, F]``, F = 1 + S // hop; see :func:`read_sound`."""
    window, hop = round(spectrogram.window * spectrogram.rate), round(spectrogram.hop * spectrogram.rate)
    size = 2 ** math.ceil(math.log2(window))
    spectrum = torch.stft(
        samples,
        size,
        hop,
        window,
        torch.hann_window(window, device=samples.device),
        pad_mode="constant",  # a sound shorter than half a window can't be mirrored
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    return (mel_filters(size, spectrogram.bands, spectrogram.rate).to(power) @ power).clamp_min(1e-10).log()


def mel_filters(size, bands, rate):
    """Triangles over the frequencies of a Fourier transform, float64 ``[M, size // 2 + 1]``: as those of
    ``torchaudio.functional.melscale_fbanks(norm=None, mel_scale="htk")``.

    Source: mel = 2595 log10(1 + f / 700), O'Shaughnessy 1987; Young et al., The HTK Book, 5.6.
    """
    frequencies = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)
    mels = torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((frequencies - low) / (peak - low), (high - frequencies) / (high - peak)).clamp_min(0)
