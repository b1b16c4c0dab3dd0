"""Attention over heads, forward: online softmax, and the merge of chunks of columns. heads.py launches it."""

import triton
import triton.language as tl

from .heads_tiles import (
    Place,
    Side,
    adjust,
    arange,
    finite,
    last_one,
    load_queries,
    load_tile,
    program,
    scores,
    store_tile,
    taking_part,
)


@triton.jit
def finish(rows, gate, result, attended, m, total, acc, at, head, c, V: tl.constexpr):
    """Divides, multiplies by the gate, and writes. A row without any column gives 0, whatever its gate holds."""
    some = total != 0
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    if tl.program_id(1) == 0:
        softmax = rows.softmax + 2 * head * rows.size + at.n
        tl.store(softmax, finite(m), at.valid)
        tl.store(softmax + rows.size, tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0), at.valid)
    if attended is not None:
        store_tile(attended, acc, at, c, V)
    if gate is not None:
        acc = acc * load_tile(gate, Place(at.b, at.h, at.n, at.valid & some), c, V, tl.float32)
    store_tile(result, acc, at, c, V)


@triton.jit
def attend(
    rows,
    cols,
    pairs,
    bias,
    gate,
    result,
    attended,
    stats,
    partial,
    H,
    splits,
    chunk,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BOTH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program for each block of rows, chunk of columns, and BLOCK_V channels of the values: online softmax."""
    rows = Side(*rows)
    cols = Side(*cols)
    b, h, head, split, n = program(H, rows.size, splits, BLOCK_N)
    c = arange(tl.program_id(1) * BLOCK_V, BLOCK_V)
    d = arange(0, BLOCK_D)
    inside = n < rows.size
    row_valid = inside
    if BOTH:
        row_valid = taking_part(rows, b, h, n)
    row = Place(b, h, n, row_valid)
    q = None
    if D <= BLOCK_D:
        q = load_queries(rows, row, d, D, BOTH, DOT)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    begin = split * chunk
    end = last_one(cols, b, h, begin, tl.minimum(begin + chunk, cols.size))
    for start in range(begin, end, BLOCK_T):
        t = arange(start, BLOCK_T)
        col = Place(b, h, t, taking_part(cols, b, h, t))
        k = None
        if D <= BLOCK_D:
            k = load_tile(cols.query, col, d, D, DOT)
        s = scores(rows, cols, q, k, row, col, D, BOTH, BLOCK_D, DOT, PRECISION)
        s = adjust(s * scale, rows, cols, row, col, pairs, bias)
        s = tl.where(col.valid[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - finite(new)[:, None])
        fade = tl.exp(m - finite(new))
        total = total * fade + tl.sum(p, 1)
        v = load_tile(cols.value, col, c, V, DOT)
        acc = tl.dot(p.to(DOT), v, acc * fade[:, None], input_precision=PRECISION)
        m = new
    if partial is None:
        finish(rows, gate, result, attended, m, total, acc, Place(b, h, n, inside), head, c, V)
    else:
        at = (head * splits + split) * rows.size + n
        tl.store(partial + at[:, None] * V + c[None, :], acc, inside[:, None] & (c < V)[None, :])
        if tl.program_id(1) == 0:
            tl.store(stats + 2 * at, m, inside)
            tl.store(stats + 2 * at + 1, total, inside)


@triton.jit
def merge_attend(
    rows,
    gate,
    result,
    attended,
    stats,
    partial,
    H,
    splits,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program for each block of rows and BLOCK_V channels: joins the chunks by maximum and sum, one after another."""
    rows = Side(*rows)
    b, h, head, _, n = program(H, rows.size, 1, BLOCK_N)
    c = arange(tl.program_id(1) * BLOCK_V, BLOCK_V)
    inside = n < rows.size
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for split in range(splits):
        at = (head * splits + split) * rows.size + n
        own = tl.load(stats + 2 * at, inside, float("-inf"))
        new = tl.maximum(m, own)
        fade = tl.exp(m - finite(new))
        weight = tl.exp(own - finite(new))
        total = total * fade + tl.load(stats + 2 * at + 1, inside, 0) * weight
        part = tl.load(partial + at[:, None] * V + c[None, :], inside[:, None] & (c < V)[None, :], 0)
        acc = acc * fade[:, None] + part * weight[:, None]
        m = new
    finish(rows, gate, result, attended, m, total, acc, Place(b, h, n, inside), head, c, V)
