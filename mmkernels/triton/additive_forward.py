"""Additive attention's kernels, forward. additive_attention.py launches them."""

import triton
import triton.language as tl

from .additive_tiles import factors_of, hidden, philox_words, range_of, split_of
from .common import all_have_read


@triton.jit
def activate(
    p,
    dropout,
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
    """A panel: u, t -> h, in place of u. With DROPOUT a program has its columns of every quarter."""
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
            activate_tile(p, b, r, at, rows, factors, F, BIAS_HIDDEN, GATED, BIAS_GATE, True)
    else:
        activate_tile(p, b, r, c, rows, (), F, BIAS_HIDDEN, GATED, BIAS_GATE, False)


@triton.jit
def activate_tile(
    p,
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
    y, _, s, _ = hidden(p, b, r, c, inside, factors, F, BIAS_HIDDEN, GATED, BIAS_GATE, DROPOUT)
    all_have_read()
    tl.store(p.u + r[:, None] * p.A + c[None, :], y * s, mask=inside)


@triton.jit
def normalise(
    scores,
    weights,
    given,
    mask,
    bounds,
    rows,
    K,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    GIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scores [rows, K] -> weights; with GIVE the scores, too, in given, like weights."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    begin, end = range_of(bounds, b, rows)
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0, tl.float32)
    count = tl.full([], 0, tl.int32)
    for n in range(begin, end, BLOCK):
        r = n + tl.arange(0, BLOCK).to(tl.int64)
        valid = r < end
        if MASKED:
            valid = valid & (tl.load(mask + r, mask=valid, other=0) != 0)
        x = tl.load(scores + r * K + k, mask=valid, other=float("-inf")).to(tl.float32)
        now = tl.maximum(m, tl.max(x, 0))
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(m - base) + tl.sum(tl.exp(x - base), 0)
        count += tl.sum(valid.to(tl.int32), 0)
        m = now
    base = tl.where(m == float("-inf"), 0.0, m)
    share = tl.where(
        count > 0, 1.0 / tl.where(count > 0, total, 1.0), 0.0
    )  # scores all -Inf: 0 * Inf = NaN, as the definition has it
    to = b * weights.b + k * weights.k
    for n in range(begin, end, BLOCK):
        r = n + tl.arange(0, BLOCK).to(tl.int64)
        inside = r < end
        valid = inside
        if MASKED:
            valid = valid & (tl.load(mask + r, mask=inside, other=0) != 0)
        x = tl.load(scores + r * K + k, mask=valid, other=float("-inf")).to(tl.float32)
        at = to + (r if PACKED else r - begin)
        tl.store(weights.data + at, tl.where(valid, tl.exp(x - base) * share, 0.0), mask=inside)
        if GIVE:
            tl.store(given + at, x, mask=inside)


@triton.jit
def pool(
    weights,
    image,
    bounds,
    partial,
    rows,
    K,
    C,
    splits,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial [B, splits, K, C]: sums of weights times image over a piece of a sample."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    part = tl.program_id(0) % splits
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(2).to(tl.int64)
    begin, end = range_of(bounds, b, rows)
    first, last = split_of(begin, end, part, splits, BLOCK_N)
    total = tl.zeros([BLOCK_C], tl.float32)
    for n in range(first, last, BLOCK_N):
        r = n + tl.arange(0, BLOCK_N).to(tl.int64)
        w = tl.load(
            weights.data + b * weights.b + k * weights.k + (r if PACKED else r - begin), mask=r < last, other=0.0
        )
        row = image.data + (r if PACKED else r - begin)[:, None] * image.n + b * image.b
        # What doesn't take part isn't read: it may be NaN.
        x = tl.load(row + c[None, :].to(tl.int64) * image.c, mask=(w != 0)[:, None] & (c < C)[None, :], other=0.0).to(
            tl.float32
        )
        total += tl.sum(x * w[:, None], 0)
    tl.store(partial + ((b * splits + part) * K + k) * C + c, total, mask=c < C)


@triton.jit
def spread(
    weights,
    image,
    sample,
    bounds,
    result,
    rows,
    C,
    first,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """result = weights * image, a panel's rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = first + n
    b = tl.load(sample + n, mask=r < rows, other=0).to(tl.int64)
    begin = tl.load(bounds + b)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    w = tl.load(weights.data + (r if PACKED else b * weights.b + r - begin), mask=r < rows, other=0.0)
    row = image.data + (r if PACKED else r - begin)[:, None] * image.n + b[:, None] * image.b
    x = tl.load(row + c[None, :].to(tl.int64) * image.c, mask=inside & (w != 0)[:, None], other=0.0).to(tl.float32)
    tl.store(result + r[:, None] * C + c[None, :], (x * w[:, None]).to(result.dtype.element_ty), mask=inside)
