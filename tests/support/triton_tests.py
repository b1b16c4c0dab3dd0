"""What the tests of Triton's kernels share. triton.jit reads TRITON_INTERPRET when a kernel is defined, so it has to be
set before mmkernels is imported: `make test-triton`."""

import importlib.util

import pytest
import torch

from mmkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

interpreted = pytest.mark.skipif(not backends.INTERPRETED, reason="mmkernels was imported without TRITON_INTERPRET=1")
on_every_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d).removeprefix("torch.")
)


def draw(*shape, dtype=torch.float32, seed=0):
    """Tensors of other shapes hold other numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


class Guards:
    """Every tensor that is placed lies between guards; what nobody writes stays 77."""

    def __init__(self):
        self.bases = []

    def place(self, shape, dtype, strides=None):
        shape = torch.Size(shape)
        if strides is None:
            room = shape.numel()
        else:
            room = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if all(shape) else 0
        base = torch.full((room + 64,), 77.0, dtype=dtype)
        self.bases.append((base, room))
        return base[32 : 32 + room].view(shape) if strides is None else base.as_strided(shape, strides, 32)

    def place_fresh(self, monkeypatch):
        """What comes from torch.empty is placed."""
        size_of = lambda size: size[0] if isinstance(size[0], (tuple, list)) else size
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: self.place(size_of(size), dtype))

    def intact(self):
        return all(bool((base[:32] == 77).all()) and bool((base[32 + room :] == 77).all()) for base, room in self.bases)
