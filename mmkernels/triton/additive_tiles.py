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
    p, sample, r, c, inside, F: tl.constexpr, BIAS_HIDDEN: tl.constexpr, GATED: tl.constexpr, BIAS_GATE: tl.constexpr
):
    """(activation, its derivative, gate) of a panel's tile"""
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
    return y, slope, s


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
