"""What reads each modality: a CNN the image, an LSTM the text, a CNN the sound; and what stands in for one that is
missing."""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import nn
from torch.nn import functional as F

from .. import checks

PAD = 0
NORMS = {
    "none": lambda channels: [],
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "group": lambda channels: [nn.GroupNorm(gcd(8, channels), channels)],
}


@dataclass
class Image:
    """levels: features ``[B, D, Y, X]`` of several resolutions, the finest first; present bool ``[B]``, or None: in all
    samples; aligned ``[B, A]``, where it is compared with other modalities."""

    levels: list
    present: torch.Tensor = None
    aligned: torch.Tensor = None


@dataclass
class Sequence:
    """Text or sound, encoded: tokens ``[B, T, E]``, of which those of the mask ``[B, T]`` take part; vector ``[B, E]``,
    all of it; embedded ``[B, T, C]``, the tokens before they were read in their order; order ``[B, T]``, where each
    stood in the argument; present and aligned as the image's."""

    tokens: torch.Tensor
    mask: torch.Tensor
    vector: torch.Tensor
    embedded: torch.Tensor = None
    order: torch.Tensor = None
    present: torch.Tensor = None
    aligned: torch.Tensor = None

    def split(self, batch):
        """Of ``B K`` texts: the first texts of all samples, the second, ..."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        parts = (value.unflatten(0, (batch, -1)).unbind(1) for value in fields.values())
        return [replace(self, **dict(zip(fields, part))) for part in zip(*parts)]


class ImageEncoder(nn.Sequential):
    """A convolution 3 x 3, a pooling 2 x 2 and relu for each of `channels`; with a norm after each convolution.

    Shape:
        image ``[B, 3, Y, X]`` -> features of the last, ``[B, D, Y', X']``; with ``levels`` of the last so many, a
        list, the finest first.
    """

    def __init__(self, channels, norm="none"):
        # The largest of four is pooled first: relu then works on a quarter of the elements, with the same results and
        # gradients to the bit, since it keeps the order.
        super().__init__(
            *(
                layer
                for before, after in zip((3, *channels), channels)
                for layer in (nn.Conv2d(before, after, 3), *NORMS[norm](after), nn.MaxPool2d(2), nn.ReLU())
            )
        )
        self.smallest = 1
        for _ in channels:
            self.smallest = 2 * self.smallest + 2

    def forward(self, image, levels=None):
        found = []
        for layer in self:
            image = layer(image)
            if isinstance(layer, nn.ReLU):
                found.append(image)
        return image if levels is None else found[-levels:]


class SoundEncoder(nn.Module):
    """Two convolutions 3 x 3 with strides of 2; then every fourth frame is a token.

    Shape:
        sound float ``[B, M, F]``, any M and F from 1 -> :class:`Sequence` of ``F / 4`` tokens (rounded up), whose
        vector is their mean. A frame with NaN in any band is padding, and never changes a result.
    """

    ROWS = 4  # what any number of bands is averaged to

    def __init__(self, width, channels=(16, 32)):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in zip((1, *channels), channels)
        )
        self.projection = nn.Linear(self.ROWS * channels[-1], width)

    def forward(self, sound):
        mask = ~sound.isnan().any(1)
        sound = sound.where(mask[:, None], 0)[:, None]
        for convolution in self.convolutions:
            mask = mask[:, ::2]
            sound = convolution(sound).relu().where(mask[:, None, None], 0)  # as beyond the end of a shorter one
        rows = F.adaptive_avg_pool2d(sound, (self.ROWS, sound.shape[3]))
        tokens = self.projection(rows.flatten(1, 2).mT)
        return Sequence(tokens, mask, mean_of_tokens(tokens, mask))


class Substitutes(nn.Module):
    """Learned vectors that stand in where a modality is missing, by name. Each is an embedding's only row, so that
    whatever knows embeddings (per-sample gradients, sharding) knows them."""

    def __init__(self, **widths):
        super().__init__()
        self.rows = nn.ModuleDict({name: nn.Embedding(1, width) for name, width in widths.items()})
        for row in self.rows.values():
            nn.init.normal_(row.weight, std=0.02)

    def forward(self, name, like):
        """``[B, width]``, for samples `like` these: in their dtype, on their device."""
        return self.rows[name](torch.zeros(len(like), dtype=torch.int64, device=like.device)).to(like.dtype)


def mean_of_tokens(tokens, mask):
    """``[B, T, C]`` and a mask ``[B, T]`` -> ``[B, C]``, of those that take part; 0 where none does."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return tokens.where(mask[:, :, None], 0).sum(1) / count


def read_text(text, embedding, lstm):
    """Token ids ``[B, T]`` -> :class:`Sequence`: the LSTM's states after each token, the last is the vector."""
    padding = text == PAD
    order = padding.int().argsort(stable=True, dim=1)
    text = text.gather(1, order)  # tokens first, in their order
    lengths = (~padding).sum(1)
    if checks.is_traced(text):
        longest = max(1, text.shape[1])
    else:
        longest = max(1, int(lengths.max())) if len(lengths) else 1  # trailing padding costs nothing
    text = F.pad(text[:, :longest], (0, longest - min(longest, text.shape[1])), value=PAD)
    embedded = embedding(text)
    states, _ = lstm(embedded)
    mask = torch.arange(longest, device=text.device) < lengths[:, None]
    vector = F.pad(states, (0, 0, 1, 0))  # before the first token: the initial state
    vector = vector[torch.arange(len(text), device=text.device), lengths]
    return Sequence(states, mask, vector, embedded=embedded, order=order)
