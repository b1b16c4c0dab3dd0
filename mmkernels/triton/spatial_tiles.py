"""What the kernels of spatial attention share: their arguments, and where things lie."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import Features, Vectors


class Sizes(NamedTuple):
    B: int  # samples (bags)
    N: int  # positions of a sample; packed: rows of all bags
    X: Any  # length of a row of positions; None where positions have one stride
    H: int  # heads
    chunk: int  # positions of a chunk
    fits: int  # a packed bag of at most so many positions is left to `whole`


class Arguments(NamedTuple):
    image: Features
    text: Vectors
    mask: Any  # Features or None
    offsets: Any  # int64 [B + 1] or None
    weights: torch.Tensor  # [B, H, N], packed [H, rows]: until `apply` the scores
    s: Sizes
    scale: float


class Gradients(NamedTuple):
    result: Any  # Features (multiply) or None
    pooled: Any  # Vectors (pool) or None
    weights: Any  # like weights or None
    image: Any  # Features or None: not wanted
    text: Any  # Vectors or None: not wanted
    scores: Any  # scratch like weights, for `apply`


# Where things lie ----------------------------------------------------------------------------------------------------


@triton.jit
def bounds(a, b):
    """A sample's first position, and the one behind its last. Offsets can't be checked without waiting for the device:
    wrong ones give wrong results, but touch no memory that isn't the tensors'."""
    if a.offsets is None:
        first, last = b * 0, b * 0 + a.s.N
    else:
        first = tl.minimum(tl.maximum(tl.load(a.offsets + b), 0), a.s.N)
        last = tl.maximum(tl.minimum(tl.load(a.offsets + b + 1), a.s.N), first)
    return first, last


@triton.jit
def first_chunk(a, b, first):
    """Chunks are cut at multiples of s.chunk. A packed bag that doesn't start at one shares it with the bag in front:
    one more chunk a bag makes room for that, and a bag's first chunk needs no sum over the other bags."""
    if a.offsets is None:
        number = b * tl.cdiv(a.s.N, a.s.chunk)
    else:
        number = first // a.s.chunk + b
    return number


@triton.jit
def locate(a, number):
    """A chunk's sample, its first position and the one behind its last."""
    if a.offsets is None:
        b = number // tl.cdiv(a.s.N, a.s.chunk)
    else:
        b, above = number * 0, number * 0 + a.s.B
        while above - b > 1:
            middle = (b + above) // 2
            start = tl.minimum(tl.maximum(tl.load(a.offsets + middle), 0), a.s.N)
            left = first_chunk(a, middle, start) <= number
            b = tl.where(left, middle, b)
            above = tl.where(left, above, middle)
    first, last = bounds(a, b)
    block = (number - first_chunk(a, b, first) + first // a.s.chunk) * a.s.chunk
    begin = tl.maximum(first, block)
    end = tl.maximum(tl.minimum(last, block + a.s.chunk), begin)
    if a.offsets is not None:
        end = tl.where(last - first <= a.s.fits, begin, end)
    return b, begin, end


@triton.jit
def arange(BLOCK: tl.constexpr):
    """64 bits wide, as all that is multiplied by a stride. (With 32 bits inside a tile the compilers keep every
    element's address over a loop, and need more registers, not fewer.)"""
    return tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def rows(a, f, b, n):
    """Pointers to positions n of a sample."""
    if a.s.X is None:
        place = n * f.x
    else:
        place = n // a.s.X * f.y + n % a.s.X * f.x
    return f.data + b * f.b + place


@triton.jit
def tile(a, f, b, h, n, c, C: tl.constexpr):
    """Pointers to positions n and one head's channels c."""
    return rows(a, f, b, n)[:, None] + (h * C + c)[None, :] * f.d


@triton.jit
def vector(v, b, h, c, C: tl.constexpr):
    return v.data + b * v.b + (h * C + c) * v.d


@triton.jit
def weights_of(a, b, h):
    sample = b if a.offsets is None else b * 0
    return (sample * a.s.H + h) * a.s.N


@triton.jit
def taking_part(a, b, n, end):
    valid = n < end
    if a.mask is not None:
        valid = valid & (tl.load(rows(a, a.mask, b, n), valid, 0) != 0)
    return valid


@triton.jit
def load_tile(a, f, b, h, n, c, valid, C: tl.constexpr):
    return tl.load(tile(a, f, b, h, n, c, C), valid[:, None] & (c < C)[None, :], 0).to(tl.float32)


@triton.jit
def store_tile(a, f, x, b, h, n, c, end, C: tl.constexpr):
    tl.store(tile(a, f, b, h, n, c, C), x.to(f.data.dtype.element_ty), (n < end)[:, None] & (c < C)[None, :])


@triton.jit
def load_vector(v, b, h, c, C: tl.constexpr):
    return tl.load(vector(v, b, h, c, C), c < C, 0).to(tl.float32)


@triton.jit
def store_vector(v, x, b, h, c, C: tl.constexpr):
    tl.store(vector(v, b, h, c, C), x.to(v.data.dtype.element_ty), c < C)


@triton.jit
def split_program(H):
    pid = tl.program_id(0).to(tl.int64)
    return pid, pid // H, pid % H
