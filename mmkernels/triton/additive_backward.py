"""Additive attention's kernels, backward. additive_attention.py launches them."""

import triton
import triton.language as tl

from .additive_tiles import factors_of, hidden, philox_words, range_of, split_of
from .common import all_have_read


@triton.jit
def differentiate(
    p,
    dropout,
    up,
    sample,
    rows,
    F: tl.constexpr,
    BIAS_HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    BIAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A panel: u, t and h's gradient -> the gradients of u and t, in place; h, in place of its gradient. With DROPOUT a
    program has its columns of every quarter."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.load(sample + r, mask=r < rows, other=0)
    if DROPOUT:
        quarter = tl.cdiv(p.A, 4)
        words = philox_words(dropout, r, c, 0, BLOCK_N, BLOCK_C)
        words_of_gate = philox_words(dropout, r, c, 1, BLOCK_N, BLOCK_C) if GATED else words
        for w in tl.static_range(4):
            at = tl.where(c < quarter, w * quarter + c, p.A)
            factors = factors_of(words, words_of_gate, w, dropout)
            differentiate_tile(p, up, b, r, at, rows, factors, F, BIAS_HIDDEN, GATED, BIAS_GATE, True)
    else:
        differentiate_tile(p, up, b, r, c, rows, (), F, BIAS_HIDDEN, GATED, BIAS_GATE, False)


@triton.jit
def differentiate_tile(
    p,
    up,
    b,
    r,
    c,
    rows,
    factors,
    F: tl.constexpr,
    BIAS_HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    BIAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    inside = (r < rows)[:, None] & (c < p.A)[None, :]
    y, slope, s, rest = hidden(p, b, r, c, inside, factors, F, BIAS_HIDDEN, GATED, BIAS_GATE, DROPOUT)
    at = r[:, None] * p.A + c[None, :]
    dh = tl.load(up + at, mask=inside, other=0.0)
    all_have_read()
    tl.store(up + at, y * s, mask=inside)
    tl.store(p.u + at, dh * s * slope, mask=inside)
    if GATED:
        tl.store(p.t + at, dh * y * s * rest, mask=inside)


@triton.jit
def differentiate_weights(
    weights,
    image,
    grad,
    given,
    bounds,
    found,
    rows,
    K,
    C,
    splits,
    PACKED: tl.constexpr,
    GRAD: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """found [K, rows]: the weights' gradient; grad.n is 0 where all positions of a sample share it (pool)."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    part = tl.program_id(0) % splits
    k = tl.program_id(1).to(tl.int64)
    begin, end = range_of(bounds, b, rows)
    first, last = split_of(begin, end, part, splits, BLOCK_N)
    for n in range(first, last, BLOCK_N):
        r = n + tl.arange(0, BLOCK_N).to(tl.int64)
        at = b * weights.b + k * weights.k + (r if PACKED else r - begin)
        valid = tl.load(weights.data + at, mask=r < last, other=0.0) != 0
        total = tl.zeros([BLOCK_N], tl.float32)
        if GRAD:
            row = image.data + (r if PACKED else r - begin)[:, None] * image.n + b * image.b
            up = grad.data + b * grad.b + k * grad.k + (r if PACKED else r - begin)[:, None] * grad.n
            for c0 in range(0, C, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
                inside = valid[:, None] & (c < C)[None, :]
                x = tl.load(row + c[None, :] * image.c, mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(x * tl.load(up + c[None, :] * grad.c, mask=inside, other=0.0).to(tl.float32), 1)
        if GIVEN:
            total += tl.load(given + at, mask=valid, other=0.0)
        tl.store(found + k * rows + r, total, mask=r < last)


@triton.jit
def mean_of(weights, found, begin, end, base, BLOCK: tl.constexpr):
    """sum w (x - base) / sum w, each piece summed on its own."""
    total, mass = 0.0, 0.0
    for n in range(begin, end, BLOCK):
        r = n + tl.arange(0, BLOCK).to(tl.int64)
        w = tl.load(weights + r, mask=r < end, other=0.0)
        x = tl.load(found + r, mask=r < end, other=0.0)
        total += tl.sum(tl.where(w != 0, w * (x - base), 0.0), 0)
        mass += tl.sum(w, 0)
    return total / tl.where(mass == 0.0, 1.0, mass)


@triton.jit
def differentiate_scores(
    weights,
    found,
    given,
    mask,
    bounds,
    rows,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found [K, rows]: the weights' gradient -> the scores', with what is given to the scores that take part. The mean
    is found twice: what all have in common has to cancel."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    begin, end = range_of(bounds, b, rows)
    at = b * weights.b + k * weights.k + (0 if PACKED else -begin)
    own = weights.data + at
    x = found + k * rows
    mean = mean_of(own, x, begin, end, 0.0, BLOCK)
    rest = mean_of(own, x, begin, end, mean, BLOCK)
    for n in range(begin, end, BLOCK):
        r = n + tl.arange(0, BLOCK).to(tl.int64)
        w = tl.load(own + r, mask=r < end, other=0.0)
        ds = tl.where(w != 0, w * (tl.load(x + r, mask=r < end, other=0.0) - mean - rest), 0.0)
        if GIVEN:
            valid = r < end
            if MASKED:
                valid = valid & (tl.load(mask + r, mask=valid, other=0) != 0)
            ds += tl.load(given + at + r, mask=valid, other=0.0)
        all_have_read()
        tl.store(x + r, ds, mask=r < end)


@triton.jit
def combine(
    through,
    weights,
    grad,
    mask,
    sample,
    bounds,
    result,
    rows,
    K,
    C,
    first,
    PACKED: tl.constexpr,
    GRAD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A panel: result = through + sum over maps of weights * grad; 0 where masked."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    r = first + n
    b = tl.load(sample + n, mask=r < rows, other=0).to(tl.int64)
    begin = tl.load(bounds + b)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    if MASKED:
        inside_valid = inside & (tl.load(mask + r, mask=r < rows, other=0) != 0)[:, None]
    else:
        inside_valid = inside
    total = tl.load(through + n[:, None] * C + c[None, :], mask=inside_valid, other=0.0).to(tl.float32)
    if GRAD:
        at = r if PACKED else b * weights.b + r - begin  # 64 bits, from map to map
        up = grad.data + b[:, None] * grad.b + (r if PACKED else r - begin)[:, None] * grad.n + c[None, :] * grad.c
        for _ in range(K):
            w = tl.load(weights.data + at, mask=r < rows, other=0.0)
            total += w[:, None] * tl.load(up, mask=inside_valid & (w != 0)[:, None], other=0.0).to(tl.float32)
            at += weights.k
            up += grad.k
    tl.store(result + r[:, None] * C + c[None, :], total.to(result.dtype.element_ty), mask=inside)
