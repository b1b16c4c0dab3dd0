"""Sound files as spectrograms. Needs mmkernels[demo], and espeakng-loader for speech."""

import math

import pytest
import torch
from support import speech
from support.attention_tests import assert_rule

np = pytest.importorskip("numpy")
soundfile = pytest.importorskip("soundfile")
for package in ("soxr", "espeakng_loader", "tqdm"):
    pytest.importorskip(package)

from mmkernels import data, training  # noqa: E402
from mmkernels.data import sound_files  # noqa: E402
from mmkernels.models import ImageTextModel  # noqa: E402

HELD_OUT = ("en+m3", "en-us+f3")


def tone(frequency, seconds=1.0, rate=16_000):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("size, bands, rate", [(512, 64, 16_000), (256, 20, 8_000), (2048, 128, 44_100)])
def test_filters_are_those_of_transformers(size, bands, rate):
    """Both are float64, and take the same formula in other steps."""
    audio = pytest.importorskip("transformers.audio_utils")
    theirs = audio.mel_filter_bank(size // 2 + 1, bands, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
    theirs = torch.from_numpy(theirs.T)
    assert_rule(sound_files.mel_filters(size, bands, rate), theirs, peer=theirs)


def test_every_frequency_is_heard():
    """Between the first peak and the last, at 28 and 7671 Hz, the triangles add up to 1."""
    total = sound_files.mel_filters(512, 64, 16_000).sum(0)[1:246]
    assert_rule(total, torch.ones_like(total), peer=torch.ones_like(total))


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_a_tone_is_where_it_should_be(rate, tmp_path):
    """Whatever the file's rate, in the band whose peak is nearest; and mono is stereo's mean."""
    samples = tone(1000, rate=rate)
    soundfile.write(tmp_path / "mono.wav", samples, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples * 2, 0 * samples], 1), rate, subtype="FLOAT")
    found = data.read_sound(tmp_path / "mono.wav")
    assert found.shape == (64, 101) and found.dtype == torch.float32
    mels = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), 66)[1:-1]
    assert found.mean(1).argmax() == (mels - 2595 * math.log10(1 + 1000 / 700)).abs().argmin()
    assert torch.equal(found, data.read_sound(tmp_path / "stereo.wav"))


@pytest.mark.parametrize("count", [1, 2, 399, 16_000])
def test_any_length(count, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.full(count, 0.1), 16_000)
    found = data.read_sound(tmp_path / "short.wav")
    assert found.shape == (64, 1 + count // 160) and found.isfinite().all()


def test_settings():
    spectrogram = data.Spectrogram(rate=8_000, bands=20, window=0.02, hop=0.02)
    found = sound_files.log_mel(torch.zeros(8_000), spectrogram)
    assert found.shape == (20, 51) and (found == torch.tensor(1e-10).log()).all()
    with pytest.raises(ValueError, match="hop"):
        data.Spectrogram(hop=0.0)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_formats(ending, tmp_path):
    soundfile.write(tmp_path / f"sound.{ending}", tone(440), 16_000)
    assert data.read_sound(tmp_path / f"sound.{ending}").shape == (64, 101)


def broken(kind, folder):
    """A file that can't be used, and what should be said of it."""
    path = folder / f"{kind}.flac"
    if kind == "cut off":
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
        path.write_bytes(path.read_bytes()[:9_000])
        return path, "can't be read"
    if kind == "empty sound":
        soundfile.write(path, np.zeros(0), 16_000)
        return path, "empty"
    if kind == "not finite":
        path = path.with_suffix(".wav")
        soundfile.write(path, np.array([0.0, np.inf]), 16_000, subtype="FLOAT")
        return path, "finite"
    if kind == "too long":  # an hour and a second of silence, in a few KB
        soundfile.write(path, np.zeros(3601 * 1000, dtype=np.int16), 1000)
        return path, "longer than"
    path.write_bytes({"empty": b"", "text": b"not a sound" * 99}[kind])
    return path, "can't be read"


@pytest.mark.parametrize("kind", ["cut off", "empty sound", "not finite", "too long", "empty", "text"])
def test_broken_files_are_named(kind, tmp_path):
    path, message = broken(kind, tmp_path)
    with pytest.raises(data.UnreadableError, match=message) as caught:
        data.read_sound(path)
    assert str(path) in str(caught.value)


def write_words(folder, words, voices, speeds=(140, 190)):
    """A wave file for each word, voice and speed; the lines of a CSV file for it."""
    lines = []
    for word in words:
        for voice in voices:
            for speed in speeds:
                name = f"{word}-{voice}-{speed}.wav"
                soundfile.write(folder / name, *speech.say(word, voice, speed=speed))
                lines.append(f"{name},{word}")
    return lines


def test_speech_in_a_table(tmp_path):
    """Different lengths in a batch: the shorter end in NaN, which is padding for the model."""
    lines = write_words(tmp_path, ["one", "seven"], speech.VOICES[:2])
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "rows.csv").write_text("\n".join(["sound,label", *lines, "text.wav,one", ",one"]))
    table = data.Table(tmp_path / "rows.csv")
    assert [row.line for row in table.problems] == [10, 11] and "as sound" in table.problems[0].problem
    preprocessing = table.learn()
    assert preprocessing.modalities == ("sound",) and preprocessing.task == "binary"
    sound = table.collate([table[index] for index in range(8)]).inputs["sound"]
    frames = [table[index][2].shape[1] for index in range(8)]
    assert sound.shape == (8, 64, max(frames)) and len(set(frames)) > 1
    assert [int(clip[0].isfinite().sum()) for clip in sound] == frames
    assert torch.equal(sound[0, :, : frames[0]], preprocessing.sound(tmp_path / "one-en+m1-140.wav"))
    heard = sound[sound.isfinite()].double()
    # A difference and its quotient are rounded to float32, and so is what they are of.
    rounding = 4 * torch.finfo(torch.float32).eps * heard.abs().max()
    assert heard.mean().abs() <= rounding and (heard.std(correction=0) - 1).abs() <= rounding


def trained(folder, lines, held_out, header, **options):
    """The share of held-out rows that a model answers right after it was trained on the others."""
    tables = []
    for name, rows in (("training", lines), ("held out", held_out)):
        (folder / f"{name}.csv").write_text("\n".join([header, *rows]))
        preprocessing = tables[0].learn() if tables else data.Preprocessing(size=16)
        tables.append(data.Table(folder / f"{name}.csv", preprocessing=preprocessing))
    torch.manual_seed(0)
    sizes = {"channels": (8, 16), "embedding": 8, "hidden": 32}
    task = {"task": preprocessing.task, "outputs": preprocessing.outputs}
    model = ImageTextModel(2, sound=True, substitutes=True, fusion=options.pop("fusion"), **task, **sizes)
    training.fit(model, tables[0], learning_rate=3e-3, batch_size=12, progress=False, **options)
    return training.evaluate(model, tables[1], batch_size=50)["accuracy"]


def test_learns_words(tmp_path):
    """Spoken words, of voices that it never heard."""
    words = ["one", "seven", "four"]
    lines = write_words(tmp_path, words, [voice for voice in speech.VOICES if voice not in HELD_OUT])
    held_out = write_words(tmp_path, words, HELD_OUT)
    assert trained(tmp_path, lines, held_out, "sound,label", fusion="bidirectional", epochs=30) >= 0.9


@pytest.mark.slow
def test_learns_whether_a_word_describes_a_picture(tmp_path):
    """A colour and its name, of voices that it never heard: neither alone tells the answer."""
    Image = pytest.importorskip("PIL.Image")
    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}
    for name, colour in colours.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")

    def pairs(voices):
        spoken = write_words(tmp_path, colours, voices, (140, 165, 190))
        clips = [line.split(",") for line in spoken]
        return [f"{name}.png,{clip},{'yes' if name == word else 'no'}" for clip, word in clips for name in colours]

    lines = pairs([voice for voice in speech.VOICES if voice not in HELD_OUT])
    assert trained(tmp_path, lines, pairs(HELD_OUT), "path,sound,label", fusion="gated", epochs=15) >= 0.8
