"""What the suite knows of each operation, a file each. Whoever adds an operation adds its file.

VARIANTS are small calls in each of its forms: every property of tests/test_conformance*.py holds for all of them.

FORMS are valid calls of the public function by name, and MISTAKES what is wrong with them beyond what support/mistakes.py
makes of all; KERNELS are valid calls of the registered operation and, by suffix, what its other functions get besides
("_backward": gradients and what was kept), and WRONG what they must refuse beyond wrong tensors. A public mistake is
(changed arguments, exception, what the message must contain).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch


@dataclass(frozen=True)
class Variant:
    """One form of a call.

    `shapes` are the floating-point tensors' dimensions by their names, ``"B N D"``; all are differentiable. `sizes` are
    small, and each may be another. ``options(sizes)`` gives the rest, masks and offsets included. `hidden` says where a
    mask hides a tensor's elements: ``{"key": ("attn_mask", of_tokens)}``.
    """

    operation: str
    shapes: dict
    sizes: dict
    options: Callable = lambda sizes: {}
    hidden: dict = field(default_factory=dict)
    tiny: dict = field(default_factory=dict)  # sizes for what changes every element by itself
    large: dict = field(default_factory=dict)  # sizes that fill vectors and tiles, and end within them
    main: bool = False  # one of the few that stand for all where a test takes long

    def of(self, **sizes):
        """(shapes by name, options), with some sizes changed."""
        known = SimpleNamespace(**self.sizes | sizes)
        shapes = {name: tuple(getattr(known, d) for d in dims.split()) for name, dims in self.shapes.items()}
        return shapes, self.options(known)


def some(*shape):
    """A mask: two of three take part, of every sample one at least."""
    return (torch.arange(torch.Size(shape).numel()) % 3 != 1).view(shape)


def no_second(*shape):
    """A mask: of the second sample nothing takes part."""
    mask = some(*shape)
    mask[1:2] = False
    return mask


# Where a mask hides elements of a tensor.
def of_rows(mask):
    return ~mask[..., None]


def of_planes(mask):
    return ~mask[:, None]


def of_tokens(mask):
    return ~mask[:, None, :, None]
