"""The task: does this text describe this picture?"""

import random
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from .. import checks
from .batch import Batch
from .image_files import colour_statistics
from .pictures import LANGUAGES, catalogue, load_images
from .text import encode, train_tokenizer


class Pairs(Dataset):
    """Pictures, each with K texts: its names in every language, then `negatives` times as many names of others.

    Every text is so many times as often wrong as right, and so is a picture: neither alone tells anything about the
    label. That holds
    exactly, because the wrong texts of a language are its right ones, shifted along Unicode's order: for one language
    by a short way (hard: neighbours look alike, share words, or are the same emoji in another skin tone), for the
    next by a long one (easy), in turn from draw to draw.

    Args:
        pictures: P Picture, in the catalogue's order.
        images: uint8 ``[P, 3, Y, X]``.
        tokenizer: from :func:`mmkernels.data.train_tokenizer`.
        mean, std: float ``[3]``, of the training images / 255.
        near: a hard negative comes from at most so far.
        negatives: wrong texts for every right one.
        jitter: pictures are shifted and zoomed by up to this share of their size, anew from draw to draw; 0 leaves
            them as they are.
        seed: with :meth:`redraw`'s number, decides what is drawn.

    Item: ``(image float [3, Y, X], texts K str, label float [K], hard bool [K])``; ``hard`` marks the hard negatives.

    Raises:
        ValueError: too few pictures to take wrong texts from.
    """

    def __init__(
        self,
        pictures,
        images,
        tokenizer,
        mean,
        std,
        *,
        languages=LANGUAGES,
        near=4,
        negatives=1,
        jitter=0.0,
        seed=0,
    ):
        if len(pictures) < 2 * near + 2:
            raise ValueError(
                f"pictures must be at least {2 * near + 2} (wrong texts come from others), got {len(pictures)}"
            )
        self.pictures = pictures
        self.images = images
        self.tokenizer = tokenizer
        self.mean = mean.view(3, 1, 1)
        self.std = std.view(3, 1, 1)
        self.languages = languages
        self.near = near
        self.seed = seed
        self.negatives = negatives
        self.jitter = checks.share("jitter", jitter)
        self.redraw(0)

    @property
    def positive_weight(self):
        """Wrong texts for every right one: what a right one counts for in training."""
        return self.negatives

    @property
    def draws(self):
        """After so many every language has had hard and easy negatives."""
        return len(self.languages)

    def redraw(self, number):
        """Draws other negatives, and other jitter, the same for the same seed and number; returns self."""
        self.number = number
        draw = random.Random(f"{self.seed} {number}")
        count = len(self.pictures)
        self.hard = [(i + number) % 2 == 0 for i in range(len(self.languages) * self.negatives)]
        self.shifts = [
            draw.choice((1, -1)) * draw.randint(1, self.near)
            if hard
            else draw.randint(self.near + 1, count - self.near - 1)
            for hard in self.hard
        ]
        return self

    def texts(self, index):
        """The K texts of a picture."""
        others = [self.pictures[(index + shift) % len(self.pictures)] for shift in self.shifts]
        return [self.pictures[index].texts[l] for l in self.languages] + [
            p.texts[l] for p, l in zip(others, self.languages * self.negatives)
        ]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        image = (self._jittered(index) / 255 - self.mean) / self.std
        label = torch.tensor([1.0] * len(self.languages) + [0.0] * len(self.hard))
        return image, self.texts(index), label, torch.tensor([False] * len(self.languages) + self.hard)

    def _jittered(self, index):
        """A picture, float from 0 to 255, moved as this draw has it; what comes in at its sides is white."""
        image = self.images[index].float()
        if not self.jitter:
            return image
        draw = random.Random(f"{self.seed} {self.number} {index}")
        zoom, right, down = (draw.uniform(-self.jitter, self.jitter) for _ in range(3))
        where = torch.tensor([[[1 + zoom, 0, 2 * right], [0, 1 + zoom, 2 * down]]])  # sides are 2 long
        grid = F.affine_grid(where, [1, *image.shape], align_corners=False)
        return 255 - F.grid_sample(255 - image[None], grid, align_corners=False)[0]

    def collate(self, items):
        """Items to a :class:`Batch`: image ``[B, 3, Y, X]``, text int64 ``[B, K, T]``, the target ``[B, K]``, and the
        parts ``right``, ``hard`` and ``easy``: texts that describe the picture, its hard and its easy negatives."""
        images, texts, labels, hard = zip(*items)
        text = encode(self.tokenizer, [text for group in texts for text in group])
        target = torch.stack(labels)
        right = target == 1
        hard = torch.stack(hard)
        # channels_last is what the CPU's convolutions are fastest in; the fused layer reads it as it lies.
        image = torch.stack(images).contiguous(memory_format=torch.channels_last)
        return Batch(
            {"image": image, "text": text.unflatten(0, (len(items), -1))},
            target,
            {"right": right, "hard": hard, "easy": ~right & ~hard},
        )


@dataclass
class Splits:
    """What :func:`load` returns: two :class:`Pairs`, and the tokenizer learnt from the first."""

    training: Pairs
    validation: Pairs
    tokenizer: object


def split(pictures, *, fraction=0.2, seed=0):
    """Two lists of pictures. All skin tones and genders of an emoji are on one side, about ``fraction`` in the second.

    Which side an emoji is on depends on the seed and itself alone, never on the others.
    """
    held_out = {p.base: random.Random(f"{seed} {p.base}").random() < fraction for p in pictures}
    return [p for p in pictures if not held_out[p.base]], [p for p in pictures if held_out[p.base]]


def load(limit=None, *, seed=0, size=224, fraction=0.2, negatives=1, jitter=0.0, cache_dir=None, progress=True):
    """The task: pictures rendered (or read from the cache), split, with a tokenizer learnt from the training half.

    Args:
        limit: how many pictures, drawn by ``seed``; None is all of them (about 3,900).
        seed: of the draw, the split and the negatives.
        size: height and width of the images.
        fraction: share of the pictures that is held out for validation.
        negatives: wrong texts for every right one in training; in validation there is always one.
        jitter: of training pictures, see :class:`Pairs`; those for validation stay as they are.
        cache_dir, progress: as in :func:`mmkernels.data.load_images`.

    Raises:
        ImportError: a package of ``mmkernels[demo]`` isn't installed.
        ValueError: ``limit`` leaves too few pictures on one side.
    """
    pictures = list(catalogue())
    if limit is not None and limit < len(pictures):
        drawn = random.Random(seed).sample(range(len(pictures)), limit)
        pictures = [pictures[i] for i in sorted(drawn)]
    training, validation = split(pictures, fraction=fraction, seed=seed)
    tokenizer = train_tokenizer([p.texts[language] for p in training for language in LANGUAGES])
    images = load_images(training + validation, size=size, cache_dir=cache_dir, progress=progress)
    mean, std = colour_statistics([images[: len(training)]])
    return Splits(
        Pairs(training, images[: len(training)], tokenizer, mean, std, negatives=negatives, jitter=jitter, seed=seed),
        Pairs(validation, images[len(training) :], tokenizer, mean, std, seed=seed),
        tokenizer,
    )
