"""What the cases of all operations share: a case, and how it draws its tensors."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Emulated and interpreted backends take the small cases only: at most so many image elements.
SMALL = 6_000


@dataclass(frozen=True)
class Case:
    """One set of arguments. `group` is the line of verify's table that it counts for."""

    name: str
    group: str
    make: Callable
    small: bool

    def build(self, dtype, device="cpu", seed=0):
        """The arguments by name; the same seed gives the same values on every device."""
        return self.make(Draw(dtype, device, seed + zlib.crc32(self.name.encode())))

    def __str__(self):
        return self.name


def in_common(draw, rows, *, share=10, decades=0):
    """Rows that have a large part in common, beside which their differences, of channels of very different size, are
    small."""
    channels = rows.shape[-1]
    sizes = torch.logspace(0, -decades, channels, dtype=torch.float64, device=rows.device)
    return (rows.double() * sizes + share * draw.normal(channels).double()).to(rows.dtype)


class Draw:
    """Draws tensors on the CPU, so that they don't depend on the device, and moves them there."""

    def __init__(self, dtype, device, seed):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def mask(self, *shape, share=0.6):
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def padding(self, keep, value):
        """A mask to add: 0 where `keep`, else `value`."""
        return torch.zeros(keep.shape, dtype=self.dtype, device=self.device).masked_fill(~keep, value)

    @property
    def largest(self):
        """The dtype's largest number: what people put into masks instead of Inf, negative."""
        return torch.finfo(self.dtype).max
