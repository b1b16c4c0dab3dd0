"""Spatial attention's kernels, forward. spatial_attention.py launches them."""

import triton
import triton.language as tl

from .common import all_have_read
from .spatial_tiles import (
    Arguments,
    arange,
    bounds,
    first_chunk,
    load_tile,
    load_vector,
    locate,
    split_program,
    store_tile,
    store_vector,
    taking_part,
    weights_of,
)


@triton.jit
def finite(m):
    """The largest of no score, or of scores all -Inf, would make NaN of -Inf - -Inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def normaliser(total, count, RESCALE: tl.constexpr):
    """Scores all -Inf give Inf here and 0 * Inf = NaN as weights, as the definition does; no position gives 0."""
    return tl.where(count > 0, (count if RESCALE else 1.0) / total, 0.0)


@triton.jit
def scores(a, x, valid, b, h, c, C: tl.constexpr):
    t = load_vector(a.text, b, h, c, C)
    return tl.where(valid, tl.sum(x * t[None, :], 1) * a.scale, float("-inf"))


@triton.jit
def forward_whole(
    a, result, pooled, RESCALE: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A program for each (sample, head) of at most BLOCK_N positions: everything at once."""
    a = Arguments(*a)
    pid, b, h = split_program(a.s.H)
    first, last = bounds(a, b)
    if last - first > BLOCK_N:
        return
    n, c = first + arange(BLOCK_N), arange(BLOCK_C)
    valid = taking_part(a, b, n, last)
    x = load_tile(a, a.image, b, h, n, c, valid, C)
    score = scores(a, x, valid, b, h, c, C)
    e = tl.exp(score - finite(tl.max(score, 0)))
    w = tl.where(valid, e * normaliser(tl.sum(e, 0), tl.sum(valid.to(tl.float32), 0), RESCALE), 0.0)
    all_have_read()  # the result may be the image
    tl.store(a.weights + weights_of(a, b, h) + n, w, n < last)
    if result is not None:
        store_tile(a, result, w[:, None] * x, b, h, n, c, last, C)
    else:
        store_vector(pooled, tl.sum(w[:, None] * x, 0), b, h, c, C)


@triton.jit
def forward_chunks(a, stats, partial, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program for each (chunk, head): its scores, and their maximum, sum and count, and its weighted sum (pool)."""
    a = Arguments(*a)
    pid, number, h = split_program(a.s.H)
    b, begin, end = locate(a, number)
    c = arange(BLOCK_C)
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0, tl.float32)
    count = tl.full([], 0, tl.float32)
    sums = tl.zeros([BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + arange(BLOCK_N)
        valid = taking_part(a, b, n, end)
        x = load_tile(a, a.image, b, h, n, c, valid, C)
        score = scores(a, x, valid, b, h, c, C)
        tl.store(a.weights + weights_of(a, b, h) + n, score, n < end)
        new = tl.maximum(m, tl.max(score, 0))
        e = tl.exp(score - finite(new))
        fade = tl.exp(m - finite(new))
        total = total * fade + tl.sum(e, 0)
        count += tl.sum(valid.to(tl.float32), 0)
        if partial is not None:
            sums = sums * fade + tl.sum(e[:, None] * x, 0)
        m = new
    programs = tl.num_programs(0)
    tl.store(stats + pid, m)
    tl.store(stats + programs + pid, total)
    tl.store(stats + 2 * programs + pid, count)
    if partial is not None:
        tl.store(partial + pid * C + c, sums, c < C)


@triton.jit
def forward_merge(
    a,
    stats,
    partial,
    pooled,
    merged,
    programs,
    RESCALE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program for each (sample, head) and BLOCK_C channels: joins the chunks' statistics and weighted sums."""
    a = Arguments(*a)
    pid, b, h = split_program(a.s.H)
    first, last = bounds(a, b)
    if a.offsets is not None:
        if last - first <= a.s.fits:
            return
    k0 = first_chunk(a, b, first)
    k1 = k0 + (last - 1) // a.s.chunk - first // a.s.chunk + 1
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0, tl.float32)
    count = tl.full([], 0, tl.float32)
    for start in range(k0, k1, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = stats + k * a.s.H + h
        chunk_m = tl.load(at, k < k1, float("-inf"))
        new = tl.maximum(m, tl.max(chunk_m, 0))
        total = total * tl.exp(m - finite(new)) + tl.sum(
            tl.load(at + programs, k < k1, 0) * tl.exp(chunk_m - finite(new)), 0
        )
        count += tl.sum(tl.load(at + 2 * programs, k < k1, 0), 0)
        m = new
    factor = normaliser(total, count, RESCALE)
    if tl.program_id(1) == 0:
        tl.store(merged + 2 * pid, finite(m))
        tl.store(merged + 2 * pid + 1, factor)
    if partial is not None:
        c = tl.program_id(1) * BLOCK_C + arange(BLOCK_C)
        sums = tl.zeros([BLOCK_C], tl.float32)
        for start in range(k0, k1, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            share = tl.exp(tl.load(stats + k * a.s.H + h, k < k1, float("-inf")) - finite(m)) * factor
            part = tl.load(partial + (k * a.s.H + h)[:, None] * C + c[None, :], (k < k1)[:, None] & (c < C)[None, :], 0)
            sums += tl.sum(share[:, None] * part, 0)
        store_vector(pooled, sums, b, h, c, C)


@triton.jit
def forward_apply(a, result, merged, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program for each (chunk, head): scores become weights, in place, and multiply the image, maybe in place,
    too."""
    a = Arguments(*a)
    pid, number, h = split_program(a.s.H)
    b, begin, end = locate(a, number)
    c = arange(BLOCK_C)
    m = tl.load(merged + 2 * (b * a.s.H + h))
    factor = tl.load(merged + 2 * (b * a.s.H + h) + 1)
    for start in range(begin, end, BLOCK_N):
        n = start + arange(BLOCK_N)
        valid = taking_part(a, b, n, end)
        at = a.weights + weights_of(a, b, h) + n
        w = tl.where(valid, tl.exp(tl.load(at, valid, 0) - m) * factor, 0.0)
        if result is not None:
            x = load_tile(a, a.image, b, h, n, c, valid, C)
        all_have_read()
        tl.store(at, w, n < end)
        if result is not None:
            store_tile(a, result, w[:, None] * x, b, h, n, c, end, C)
