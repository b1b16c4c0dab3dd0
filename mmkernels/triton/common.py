"""What the Triton operations share: tensors as kernel arguments, registration, launch, the choice of a configuration.

A kernel that takes a tuple with tuples in it begins with a new one of the same: Triton 3.6 forgets what it knows of the
inner ones while it compiles (a stride that is 1, a field that is absent) as soon as it comes to a loop.
"""

import contextlib
import functools
import os
import threading
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..backends import INTERPRETED

MAX_TILE = 1 << 20  # Triton's limit on a tensor's elements


class Features(NamedTuple):
    """Elements at ``data + b * B + y * Y + x * X + d * D`` for sample, row, column and channel: strides as in
    csrc/tensor.h."""

    data: Any
    b: int
    y: int
    x: int
    d: int


class Vectors(NamedTuple):
    """[B, D]"""

    data: Any
    b: int
    d: int


def features(t):
    """image [rows, D] with offsets, [B, N, D] or [B, D, Y, X]."""
    if t.dim() == 2:
        return Features(t, 0, 0, t.stride(0), t.stride(1))
    if t.dim() == 3:
        return Features(t, t.stride(0), 0, t.stride(1), t.stride(2))
    return Features(t, t.stride(0), t.stride(2), t.stride(3), t.stride(1))


def mask_features(t, packed):
    """mask [rows] with offsets, [B, N] or [B, Y, X]."""
    t = t.view(torch.uint8)
    if packed:
        return Features(t, 0, 0, t.stride(0), 0)
    return Features(t, t.stride(0), 0 if t.dim() == 2 else t.stride(1), t.stride(-1), 0)


def vectors(t):
    return Vectors(t, t.stride(0), t.stride(1))


def merge_rows(height, width, *all_features):
    """Rows of an image that follow each other with one stride in every tensor are walked as one.

    Returns the length of a row, None where there is but one, and the features.
    """
    given = [f for f in all_features if f is not None]
    if height != 1 and width != 1 and any(f.y != width * f.x for f in given):
        return width, *all_features
    if width == 1 and height != 1:
        all_features = [f and f._replace(x=f.y) for f in all_features]
    return None, *(f and f._replace(y=0) for f in all_features)


def require(t, name, like, shape, dtype=None):
    """Keeps a kernel safe whatever arrives through torch.ops; the friendly messages live in mmkernels/checks.py."""
    if t.device != like.device or t.dtype != (dtype or like.dtype) or tuple(t.shape) != tuple(shape):
        raise RuntimeError(
            f"{name} must be {dtype or like.dtype} {list(shape)} on {like.device}, "
            f"got {t.dtype} {list(t.shape)} on {t.device}"
        )


@triton.jit
def all_have_read():
    """Comes between reading and writing an address: several warps may hold what lies there, and each reads it for
    itself."""
    tl.debug_barrier()


library = torch.library.Library("mmkernels", "FRAGMENT")


def define(schema, function):
    """Defines ``mmkernels::NAME`` and implements it on GPUs, and on the CPU where Triton interprets."""
    library.define(schema)
    name = schema.partition("(")[0]
    arguments = getattr(torch.ops.mmkernels, name).default._schema.arguments
    needed = [(i, a.name) for i, a in enumerate(arguments) if a.type.kind() == "TensorType"]

    @functools.wraps(function)
    def run(*given):
        for i, argument in needed:
            if given[i] is None:  # PyTorch hands it through, though the schema needs one
                raise RuntimeError(f"{argument} must be given")
        return function(*given)

    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        library.impl(name, run, key)


def on_device(tensor):
    """The context in which kernels are launched on `tensor`'s device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def processors(tensor):
    """How many programs a device runs side by side, at least."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


# The interpreter swaps triton.language's functions while it runs: one thread at a time.
_turn = threading.RLock() if INTERPRETED else contextlib.nullcontext()


def launch(kernel, programs, *arguments, **options):
    """`programs` may be 0, or one number for each axis of the grid.

    Nothing is contracted to a fused multiply-add: several threads hold the same sum, and a product that one of them
    rounds and another doesn't would make it two.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if all(grid):
        with _turn:
            kernel[grid](*arguments, enable_fp_fusion=False, **options)


_fastest = {}


def tuned(key, configurations, tensor, run, measure=None):
    """The configuration in which ``run(configuration)`` is fastest, measured once a key and process.

    A whole operation is measured, not a kernel: the tile decides how many programs and how much scratch all its kernels
    need. The order of a sum, and with it the last bit, depends on the choice: with MMKERNELS_TRITON_TUNE=0 it is the
    first configuration, in every process, as it is in the interpreter and while a CUDA graph is captured.
    """
    if measure is None:
        if not tensor.is_cuda or os.environ.get("MMKERNELS_TRITON_TUNE") == "0":
            return configurations[0]
        measure = triton.testing.do_bench
    key = (tensor.device, tensor.dtype, *key)
    if key not in _fastest:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return configurations[0]
        _fastest[key] = min(configurations, key=lambda configuration: measure(lambda: run(configuration)))
    return _fastest[key]
