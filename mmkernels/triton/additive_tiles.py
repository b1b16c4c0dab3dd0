"""What the kernels of additive attention share: a sample's rows, and tiles of hidden vectors."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

TANH, RELU, GELU = (tl.constexpr(i) for i in range(3))  # ops/additive_attention.py's order


class Image(NamedTuple):
    """[B, N, D], or packed [rows, D] with b = 0: strides as in csrc/tensor.h."""

    data: Any
    b: int
    n: int
    c: int


class ResultGrad(NamedTuple):
    """[B, K, D] with n = 0, or like image with k = 0."""

    data: Any
    b: int
    k: int
    n: int
    c: int


class Weights(NamedTuple):
    """[B, K, N], or packed [K, rows] with b = 0: positions lie side by side."""

    data: Any
    b: int
    k: int


class Dropout(NamedTuple):
    """csrc/dropout.h; `first` is a panel's first row."""

    seed: Any
    threshold: Any
    scale: Any
    first: Any


class Panel(NamedTuple):
    """[rows, A] u and t, and what is added to them: [B, A] bias_hidden, [A] bias_gate."""

    u: Any
    t: Any
    bias_hidden: Any
    bias_gate: Any
    A: int


@triton.jit
def activation(x, F: tl.constexpr):
    """(value, derivative)"""
    if F == TANH:
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        z = x * x
        near = x + x * z * (-0.33333319 + z * (0.13330640 + z * (-0.05369470 + z * (0.02047323 - z * 0.00551277))))
        y = tl.where(tl.abs(x) < 0.65, near, tl.where(x < 0, -far, far))
        return y, 1.0 - y * y
    elif F == RELU:
        return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    else:
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * phi, phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def hidden(
    p,
    sample,
    r,
    c,
    inside,
    factors,
    F: tl.constexpr,
    BIAS_HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    BIAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """(activation, its derivative, gate, what is left of the gate to 1) of a panel's tile; with DROPOUT the first three
    times their factors, of hidden units and of gates."""
    at = r[:, None] * p.A + c[None, :]
    x = tl.load(p.u + at, mask=inside, other=0.0)
    if BIAS_HIDDEN:
        x += tl.load(p.bias_hidden + sample[:, None].to(tl.int64) * p.A + c[None, :], mask=inside, other=0.0)
    y, slope = activation(x, F)
    s = tl.full(x.shape, 1.0, tl.float32)
    if GATED:
        z = tl.load(p.t + at, mask=inside, other=0.0)
        if BIAS_GATE:
            z += tl.load(p.bias_gate + c, mask=c < p.A, other=0.0)[None, :]
        s = 1.0 / (1.0 + tl.exp(-z))
    rest = 1.0 - s
    if DROPOUT:
        y *= factors[0]
        slope *= factors[0]
        if GATED:
            s *= factors[1]
    return y, slope, s, rest


@triton.jit
def philox_words(dropout, r, j, which: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Four words for each row r of a panel and counter j (csrc/dropout.h)."""
    row = (dropout.first + r)[:, None] + tl.zeros([BLOCK_N, BLOCK_C], tl.int64)
    counter = j[None, :] + tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    return tl.philox(tl.load(dropout.seed), counter.to(tl.uint32), low, high, tl.zeros_like(low) + which)


@triton.jit
def factors_of(words, words_of_gate, w: tl.constexpr, dropout):
    """What dropout multiplies the hidden units of the w-th quarter with, and their gates."""
    threshold = tl.cast(dropout.threshold, tl.uint32)
    return (
        tl.where(words[w] < threshold, 0.0, dropout.scale),
        tl.where(words_of_gate[w] < threshold, 0.0, dropout.scale),
    )


@triton.jit
def range_of(bounds, b, rows):
    """A sample's rows; confined, offsets on a device aren't checked."""
    begin = tl.minimum(tl.maximum(tl.load(bounds + b), 0), rows)
    return begin, tl.minimum(tl.maximum(tl.load(bounds + b + 1), begin), rows)


@triton.jit
def split_of(begin, end, part, splits, BLOCK: tl.constexpr):
    """A sample's piece for one of its programs: whole blocks."""
    size = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK) * BLOCK
    first = tl.minimum(begin + part * size, end)
    return first, tl.minimum(first + size, end)
