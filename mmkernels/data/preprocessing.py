"""From files and texts to what a model takes."""

from dataclasses import asdict, dataclass, field, fields

import torch

from .. import checks, tasks
from .extras import require
from .image_files import DENOISE, RESIZE, read_image
from .sound_files import Spectrogram, read_sound
from .text import encode

MODALITIES = ("image", "text", "sound")


@dataclass
class Preprocessing:
    """How files and texts become a model's inputs, and what its outputs are called. A model is saved with it.

    What is learnt from the training data (:meth:`mmkernels.data.Table.learn`) is None before.

    Attributes:
        size: height and width of images.
        resize, denoise: as in :func:`mmkernels.data.read_image`.
        mean, std: of the training images' colours (0 to 1), three numbers each; learnt.
        tokenizer: from :func:`mmkernels.data.train_tokenizer`; learnt.
        length: tokens of a text; what comes later is cut off.
        spectrogram: a :class:`mmkernels.data.Spectrogram`.
        sound_mean, sound_std: of the training sounds' logarithms; learnt.
        task: a name of :mod:`mmkernels.tasks`; guessed from the labels where it is None.
        labels: the classes' names in the outputs' order: two for binary (the second is the probability's), none for
            regression; learnt.
        number_mean, number_std: of a regression's numbers, which a model learns with mean 0 and standard deviation 1;
            learnt.
        modalities: which of ``"image"``, ``"text"`` and ``"sound"`` there are; learnt.
        allow_missing: whether a sample may lack some of them.
    """

    size: tuple = (224, 224)
    resize: str = "crop"
    denoise: str | None = None
    mean: tuple | None = None
    std: tuple | None = None
    tokenizer: object = None
    length: int = 256
    spectrogram: Spectrogram = field(default_factory=Spectrogram)
    sound_mean: float | None = None
    sound_std: float | None = None
    task: str | None = None
    labels: tuple | None = None
    number_mean: float | None = None
    number_std: float | None = None
    modalities: tuple | None = None
    allow_missing: bool = False

    def __post_init__(self):
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or not all(type(number) is int and 1 <= number <= 4096 for number in size):
            raise ValueError(f"size must be a number from 1 to 4096 or two (height, width), got {self.size!r}")
        self.size = size
        checks.choice("resize", self.resize, RESIZE)
        if self.denoise is not None:
            checks.choice("denoise", self.denoise, DENOISE)
        if self.task is not None:
            checks.choice("task", self.task, tasks.NAMES)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and (len(values) != 3 or not all(isinstance(value, float) for value in values)):
                raise ValueError(f"{name} must be three floats, got {values!r}")
        for name, known in (("labels", None), ("modalities", MODALITIES)):
            names = getattr(self, name)
            if names is not None and not all(isinstance(one, str) and (not known or one in known) for one in names):
                raise ValueError(f"{name} must be names{f' of {known}' if known else ''}, got {names!r}")

    @property
    def outputs(self):
        """How many outputs a model needs."""
        return len(self.labels) if self.task in ("multiclass", "multilabel") else 1

    def image(self, source):
        """A path or a Pillow image -> float ``[3, Y, X]``; see :func:`mmkernels.data.read_image`."""
        return self.normalised(read_image(source, self.size, self.resize, self.denoise))

    def normalised(self, pixels):
        """uint8 ``[..., 3, Y, X]`` -> float, mean 0 and standard deviation 1 over the training data."""
        mean, std = (torch.tensor(self._learnt(name)).view(3, 1, 1) for name in ("mean", "std"))
        return (pixels.float() / 255 - mean) / std

    def text(self, texts):
        """A list of B strings -> token ids, int64 ``[B, T]``, padded at the end with 0."""
        return encode(self._learnt("tokenizer"), texts)

    def sound(self, path):
        """A sound file -> float ``[M, F]``; see :func:`mmkernels.data.read_sound`."""
        return self.normalised_sound(read_sound(path, self.spectrogram))

    def normalised_sound(self, logarithms):
        """float ``[M, F]`` of logarithms, mean 0 and standard deviation 1 over the training data."""
        return (logarithms - self._learnt("sound_mean")) / self._learnt("sound_std")

    def standardised(self, number):
        """A regression's number as a model learns it."""
        return (number - self._learnt("number_mean")) / self._learnt("number_std")

    def number(self, standardised):
        """What a regression's model says, as a number of the data's."""
        return standardised * self._learnt("number_std") + self._learnt("number_mean")

    def _learnt(self, name):
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} isn't known yet: learn it from the training data (Table.learn) or give it")
        return value

    def to_dict(self):
        """Everything, as JSON has it."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found["spectrogram"] = asdict(self.spectrogram)
        found["tokenizer"] = None if self.tokenizer is None else self.tokenizer.to_str()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, found):
        """What :meth:`to_dict` returned, also after JSON.

        Raises:
            ValueError: it isn't that; the message names what is wrong.
        """
        known = {entry.name for entry in fields(cls)}
        if not isinstance(found, dict) or set(found) != known:
            names = sorted(set(found) ^ known) if isinstance(found, dict) else found
            raise ValueError(f"preprocessing must have {sorted(known)}, differs in {names}")
        try:
            spectrogram = Spectrogram(**found["spectrogram"])
            tokenizer = found["tokenizer"]
            if tokenizer is not None:
                tokenizer = require("tokenizers").Tokenizer.from_str(tokenizer)
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
            return cls(**{**values, "spectrogram": spectrogram, "tokenizer": tokenizer})
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"preprocessing can't be read: {error}") from error
