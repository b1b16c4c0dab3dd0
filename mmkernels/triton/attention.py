"""Attention over heads in Triton: what gated cross-attention and bidirectional attention share.

Rows attend to columns: queries to tokens, or tokens to positions. A program holds a block of one head's rows and walks
the columns; the scores exist as tiles in registers, forward and backward. Q, K, V = bytes of the rows' queries, of the
columns' keys and values. What is moved:

    attend           reads Q (and the gate) once, writes the result once; K and V are read once a block of rows, from
    the L2
                     cache but for the first time: a head of a short text is 10 to 100 KB
    prepare          reads grad, gate and result once, writes the gate's gradient and grad * gate once
    differentiate    reads one side's Q, V, grads once and writes their gradients once, the other side's once a block of
    rows;
                     launched for either side, so that no two programs add to the same gradient
    merge_*          where a side is too short to fill the device, its columns are split into chunks: the partial sums

Two softmaxes of one score matrix (bidirectional attention) have one backward: a tile's scores feed both.
Scores are never multiplied by more than `scale`, nor are they added to a logarithm of a sum: a mask may add the largest
float there is. Of a softmax the largest score and one over the sum are kept instead; where that is exactly 1, one
weight is 1 and the others are 0, and the scores have no gradient. Every sum has a fixed order: no atomics. Addresses
are 64 bits wide.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..backends import INTERPRETED
from .common import launch, processors


class HeadRows(NamedTuple):
    """[B, H, N, C]: strides as in csrc/tensor.h."""

    data: Any
    b: int
    h: int
    n: int
    c: int


class Tokens(NamedTuple):
    """[B, H, N], not 0 = takes part."""

    data: Any
    b: int
    h: int
    n: int


class Side(NamedTuple):
    """Queries or tokens, positions or text. None: there is none, or it isn't wanted."""

    size: int
    query: HeadRows  # what is multiplied to scores
    value: Any  # HeadRows: what the other side's softmax combines
    mask: Any  # Tokens: who takes part in the other side's softmax
    softmax: (
        Any  # [B, H, 2, size], of the softmax that this side's rows have over the other side: the largest score, and
    )
    # one over the sum of the exponentials, 0 where nothing takes part
    grad: Any  # HeadRows: gradient of what that softmax combined
    delta: Any  # [B, H, size]: sum(grad * what that softmax combined)


def head_rows(t):
    return None if t is None else HeadRows(t, *t.stride())


def tokens(t):
    """bool [B, H, T], or [B, T] for all heads."""
    if t is None:
        return None
    t = t.view(torch.uint8)
    return Tokens(t, t.stride(0), 0 if t.dim() == 2 else t.stride(1), t.stride(-1))


def swapped(pairs):
    """[B, H, N, T] seen from the tokens."""
    return pairs and pairs._replace(n=pairs.c, c=pairs.n)


# Where things lie ----------------------------------------------------------------------------------------------------


@triton.jit
def arange(start, BLOCK: tl.constexpr):
    """Positions and channels are 32 bits wide, and 64 where a stride multiplies them."""
    return start + tl.arange(0, BLOCK)


@triton.jit
def program(H, size, splits, BLOCK_N: tl.constexpr):
    """Blocks of rows of one head follow each other, so that they find its columns in the cache."""
    # 64-bit divisions are calls, with a stack
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK_N)
    split = pid // blocks % splits
    head = pid // blocks // splits
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    return b, h, head.to(tl.int64), split, arange(pid % blocks * BLOCK_N, BLOCK_N)


@triton.jit
def tile(x, b, h, n, c):
    return x.data + b * x.b + h * x.h + n.to(tl.int64)[:, None] * x.n + c.to(tl.int64)[None, :] * x.c


@triton.jit
def within(keep, c, C: tl.constexpr, EXACT: tl.constexpr):
    """Rows that count, and channels: EXACT, and where a block divides the channels, a mask for each row is enough."""
    if EXACT and (0 * c.shape[0] + C) % c.shape[0] == 0:  # the interpreter knows no int % constexpr
        mask = keep[:, None]
    else:
        mask = keep[:, None] & (c < C)[None, :]
    return mask


@triton.jit
def load_tile(x, b, h, n, c, keep, C: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr = True):
    """Not EXACT: of c as many blocks are walked as the wider of two tensors has."""
    return tl.load(tile(x, b, h, n, c), within(keep, c, C, EXACT), 0).to(DOT)


@triton.jit
def store_tile(x, values, b, h, n, c, inside, C: tl.constexpr, EXACT: tl.constexpr = True):
    tl.store(tile(x, b, h, n, c), values.to(x.data.dtype.element_ty), within(inside, c, C, EXACT))


@triton.jit
def taking_part(side, b, h, n):
    keep = n < side.size
    if side.mask is not None:
        keep = keep & (
            tl.load(side.mask.data + b * side.mask.b + h * side.mask.h + n.to(tl.int64) * side.mask.n, keep, 0) != 0
        )
    return keep


@triton.jit
def load_queries(
    side, b, h, n, c, keep, D: tl.constexpr, BOTH: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr = True
):
    """`keep`: those that count. BOTH softmaxes: one that is masked out has a result of its own, and NaN or Inf counts
    as 0."""
    if BOTH:
        x = load_tile(side.query, b, h, n, c, n < side.size, D, DOT, EXACT)
        if side.mask is not None:
            x = tl.where(keep[:, None] | (tl.abs(x.to(tl.float32)) < float("inf")), x, 0.0).to(DOT)
    else:
        x = load_tile(side.query, b, h, n, c, keep, D, DOT, EXACT)
    return x


@triton.jit
def product(s, x, y, PRECISION: tl.constexpr):
    """s + x y^T"""
    return tl.dot(x, tl.trans(y), s, input_precision=PRECISION)


@triton.jit
def scores(
    rows,
    cols,
    q,
    k,
    b,
    h,
    n,
    t,
    row_keep,
    col_keep,
    scale,
    pairs,
    bias,
    D: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q and k: the tiles where they hold all channels."""
    s = tl.zeros([n.shape[0], t.shape[0]], tl.float32)
    if D <= BLOCK_D:
        s = product(s, q, k, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            c = arange(start, BLOCK_D)
            s = product(
                s,
                load_queries(rows, b, h, n, c, row_keep, D, BOTH, DOT),
                load_queries(cols, b, h, t, c, col_keep, D, BOTH, DOT),
                PRECISION,
            )
    s = s * scale
    inside = (n < rows.size)[:, None] & (t < cols.size)[None, :]
    if bias is not None:
        s += tl.load(tile(bias, b, h, n, t), inside, 0)
    if pairs is not None:
        s = tl.where(tl.load(tile(pairs, b, h, n, t), inside, 0) != 0, s, float("-inf"))
    return s


@triton.jit
def last_one(side, b, h, begin, end):
    """Padding lies at the end: what is behind the last one that takes part isn't walked."""
    if side.mask is not None:
        last = begin
        for start in range(begin, end, 256):
            n = arange(start, 256)
            last = tl.maximum(last, tl.max(tl.where(taking_part(side, b, h, n), n + 1, 0), 0))
        end = tl.minimum(last, end)
    return end


# Forward -------------------------------------------------------------------------------------------------------------


@triton.jit
def finite(m):
    """The largest of no score, or of scores all -Inf, would make NaN of -Inf - -Inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def finish(rows, gate, result, attended, m, total, acc, b, h, head, n, c, V: tl.constexpr):
    """Divides, multiplies by the gate, and writes. A row without any column gives 0, whatever its gate holds."""
    inside, some = n < rows.size, total != 0
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    if tl.program_id(1) == 0:
        at = rows.softmax + 2 * head * rows.size + n
        tl.store(at, finite(m), inside)
        tl.store(at + rows.size, tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0), inside)
    if attended is not None:
        store_tile(attended, acc, b, h, n, c, inside, V)
    if gate is not None:
        acc = acc * load_tile(gate, b, h, n, c, inside & some, V, tl.float32)
    store_tile(result, acc, b, h, n, c, inside, V)


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
    row_keep = n < rows.size
    if BOTH:
        row_keep = taking_part(rows, b, h, n)
    q = None
    if D <= BLOCK_D:
        q = load_queries(rows, b, h, n, d, row_keep, D, BOTH, DOT)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    begin = split * chunk
    end = last_one(cols, b, h, begin, tl.minimum(begin + chunk, cols.size))
    for start in range(begin, end, BLOCK_T):
        t = arange(start, BLOCK_T)
        keep = taking_part(cols, b, h, t)
        k = None
        if D <= BLOCK_D:
            k = load_tile(cols.query, b, h, t, d, keep, D, DOT)
        s = scores(rows, cols, q, k, b, h, n, t, row_keep, keep, scale, pairs, bias, D, BOTH, BLOCK_D, DOT, PRECISION)
        s = tl.where(keep[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - finite(new)[:, None])
        fade = tl.exp(m - finite(new))
        total = total * fade + tl.sum(p, 1)
        v = load_tile(cols.value, b, h, t, c, keep, V, DOT)
        acc = tl.dot(p.to(DOT), v, acc * fade[:, None], input_precision=PRECISION)
        m = new
    if partial is None:
        finish(rows, gate, result, attended, m, total, acc, b, h, head, n, c, V)
    else:
        at = (head * splits + split) * rows.size + n
        inside = n < rows.size
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
    finish(rows, gate, result, attended, m, total, acc, b, h, head, n, c, V)


# Backward: s = scale q.k, p = exp(s - top) share, dp = grad.v, ds = p (dp - delta)
# ----------------------------------------


@triton.jit
def load_softmax(side, head, n):
    """The largest score, and one over the sum."""
    at = side.softmax + 2 * head * side.size + n
    return tl.load(at, n < side.size, 0), tl.load(at + side.size, n < side.size, 0)


@triton.jit
def prepare(rows, grad, gate, combined, grad_gate, H, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """A program for each block of rows: delta, the gate's gradient, and grad * gate (into rows.grad)."""
    rows = Side(*rows)
    b, h, head, _, n = program(H, rows.size, 1, BLOCK_N)
    inside = n < rows.size
    some = load_softmax(rows, head, n)[1] != 0
    delta = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, V, BLOCK_V):
        c = arange(start, BLOCK_V)
        g = load_tile(grad, b, h, n, c, some, V, tl.float32)
        out = load_tile(combined, b, h, n, c, some, V, tl.float32)
        if grad_gate is not None:
            store_tile(grad_gate, g * out, b, h, n, c, inside, V)
        if gate is not None:
            # Rounded here, too, so that delta belongs to what `differentiate` reads.
            g = (g * load_tile(gate, b, h, n, c, some, V, tl.float32)).to(rows.grad.data.dtype.element_ty)
            store_tile(rows.grad, g, b, h, n, c, inside, V)
            g = g.to(tl.float32)
        delta += tl.sum(g * out, 1)
    tl.store(rows.delta + head * rows.size + n, delta, inside)


@triton.jit
def gradient_product(
    grad,
    value,
    g,
    v,
    b,
    h,
    n,
    t,
    row_keep,
    col_keep,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dp = tl.zeros([n.shape[0], t.shape[0]], tl.float32)
    if V <= BLOCK_V:
        dp = product(dp, g, v, PRECISION)
    else:
        for start in range(0, V, BLOCK_V):
            c = arange(start, BLOCK_V)
            dp = product(
                dp,
                load_tile(grad, b, h, n, c, row_keep, V, DOT),
                load_tile(value, b, h, t, c, col_keep, V, DOT),
                PRECISION,
            )
    return dp


@triton.jit
def exponential(s, top):
    """The scores are taken again, and may round another way: a weight is at most `share` all the same."""
    return tl.exp(tl.minimum(s - top, 0.0, tl.PropagateNan.ALL))


@triton.jit
def spread(share):
    """What the scores' gradient is multiplied by: exactly 0 where one weight is 1."""
    return tl.where(share == 1, 0.0, share)


@triton.jit
def mean(p, dp, axis: tl.constexpr):
    """p may add up to anything: what dp has in common cancels."""
    total = tl.sum(p, axis)
    return tl.sum(p * dp, axis) / tl.where(total != 0, total, 1.0)


@triton.jit
def write_gradients(
    rows,
    to_query,
    to_value,
    dq,
    dv,
    scale,
    b,
    h,
    n,
    keep,
    live,
    part,
    D: tl.constexpr,
    V: tl.constexpr,
    BOTH: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_V: tl.constexpr,
):
    """Exact zeros where nothing takes part, and where a NaN counted as 0."""
    inside = n < rows.size
    if to_query is not None:
        c = arange(part * OUT_D, OUT_D)
        if BOTH:
            if rows.mask is not None:
                x = load_tile(rows.query, b, h, n, c, inside, D, tl.float32, False)
                dq = tl.where(keep[:, None] | (tl.abs(x) < float("inf")), dq, 0.0)
        else:
            dq = tl.where((keep & live)[:, None], dq, 0.0)
        store_tile(to_query, dq * scale, b, h, n, c, inside, D, False)
    if to_value is not None:
        c = arange(part * OUT_V, OUT_V)
        store_tile(to_value, tl.where(keep[:, None], dv, 0.0), b, h, n, c, inside, V, False)


@triton.jit
def differentiate(
    rows,
    cols,
    pairs,
    bias,
    grad_bias,
    to_query,
    to_value,
    partial_query,
    partial_value,
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
    OUT_D: tl.constexpr,
    OUT_V: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_COLS: tl.constexpr,
):
    """A program for each block of rows, chunk of columns, and OUT_D and OUT_V channels of the rows' gradients.

    rows.grad: the rows' softmax over the columns; cols.grad: the columns' softmax over the rows; either or both.
    ALL_ROWS, ALL_COLS: a tile holds them all, so that delta is known exactly, where `prepare` had a rounded result.
    """
    rows = Side(*rows)
    cols = Side(*cols)
    b, h, head, split, n = program(H, rows.size, splits, BLOCK_N)
    part = tl.program_id(1)
    out_d = arange(part * OUT_D, OUT_D)
    out_v = arange(part * OUT_V, OUT_V)
    d, c = arange(0, BLOCK_D), arange(0, BLOCK_V)
    row_keep = taking_part(rows, b, h, n)
    row_live = n < rows.size
    if rows.grad is not None:
        row_top, row_share = load_softmax(rows, head, n)
        row_live = row_share != 0
        row_delta = tl.load(rows.delta + head * rows.size + n, row_live, 0)
    row_counts = row_keep if BOTH else row_keep & row_live
    q, row_g, row_v = None, None, None
    if D <= BLOCK_D:
        q = load_queries(rows, b, h, n, d, row_counts, D, BOTH, DOT)
    if V <= BLOCK_V:
        if rows.grad is not None:
            row_g = load_tile(rows.grad, b, h, n, c, row_live, V, DOT)
        if cols.grad is not None:
            row_v = load_tile(rows.value, b, h, n, c, row_keep, V, DOT)
    dq = tl.zeros([BLOCK_N, OUT_D], tl.float32)
    dv = tl.zeros([BLOCK_N, OUT_V], tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, cols.size)
    if not BOTH:
        end = last_one(cols, b, h, begin, end)
        end = tl.where(tl.max(row_counts.to(tl.int32), 0) != 0, end, begin)
    for start in range(begin, end, BLOCK_T):
        t = arange(start, BLOCK_T)
        col_keep = taking_part(cols, b, h, t)
        col_live = t < cols.size
        if cols.grad is not None:
            col_top, col_share = load_softmax(cols, head, t)
            col_live = col_share != 0
        col_counts = col_keep if BOTH else col_keep & col_live
        k = None
        if D <= BLOCK_D:
            k = load_queries(cols, b, h, t, d, col_counts, D, BOTH, DOT)
        s = scores(
            rows, cols, q, k, b, h, n, t, row_counts, col_counts, scale, pairs, bias, D, BOTH, BLOCK_D, DOT, PRECISION
        )
        ds = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        if rows.grad is not None:
            p = exponential(tl.where(col_keep[None, :], s, float("-inf")), row_top[:, None])
            v = None
            if V <= BLOCK_V:
                v = load_tile(cols.value, b, h, t, c, col_keep, V, DOT)
            dp = gradient_product(
                rows.grad, cols.value, row_g, v, b, h, n, t, row_live, col_keep, V, BLOCK_V, DOT, PRECISION
            )
            if ALL_COLS:
                row_delta = mean(p, dp, 1)
            ds += p * (dp - row_delta[:, None]) * spread(row_share)[:, None]
        if cols.grad is not None:
            p = exponential(tl.where(row_keep[:, None], s, float("-inf")), col_top[None, :])
            g = None
            if V <= BLOCK_V:
                g = load_tile(cols.grad, b, h, t, c, col_live, V, DOT)
            if to_query is not None:
                dp = gradient_product(
                    rows.value, cols.grad, row_v, g, b, h, n, t, row_keep, col_live, V, BLOCK_V, DOT, PRECISION
                )
                if ALL_ROWS:
                    col_delta = mean(p, dp, 0)
                else:
                    col_delta = tl.load(cols.delta + head * cols.size + t, col_live, 0)
                ds += p * (dp - col_delta[None, :]) * spread(col_share)[None, :]
            if to_value is not None:
                if V > BLOCK_V or OUT_V != BLOCK_V:
                    g = load_tile(cols.grad, b, h, t, out_v, col_live, V, DOT, False)
                dv = tl.dot((p * col_share[None, :]).to(DOT), g, dv, input_precision=PRECISION)
        if grad_bias is not None:
            if part == 0:
                tl.store(tile(grad_bias, b, h, n, t), ds, (n < rows.size)[:, None] & (t < cols.size)[None, :])
        if to_query is not None:
            if D > BLOCK_D or OUT_D != BLOCK_D:
                k = load_queries(cols, b, h, t, out_d, col_counts, D, BOTH, DOT, False)
            dq = tl.dot(ds.to(DOT), k, dq, input_precision=PRECISION)
    if splits == 1:
        write_gradients(
            rows, to_query, to_value, dq, dv, scale, b, h, n, row_keep, row_live, part, D, V, BOTH, OUT_D, OUT_V
        )
    else:
        at = (head * splits + split) * rows.size + n
        inside = n < rows.size
        if to_query is not None:
            tl.store(partial_query + at[:, None] * D + out_d[None, :], dq, inside[:, None] & (out_d < D)[None, :])
        if to_value is not None:
            tl.store(partial_value + at[:, None] * V + out_v[None, :], dv, inside[:, None] & (out_v < V)[None, :])


@triton.jit
def add_up(partial, head, splits, size, n, c, C: tl.constexpr):
    total = tl.zeros([n.shape[0], c.shape[0]], tl.float32)
    for split in range(splits):
        at = partial + ((head * splits + split) * size + n)[:, None] * C + c[None, :]
        total += tl.load(at, (n < size)[:, None] & (c < C)[None, :], 0)
    return total


@triton.jit
def merge_gradients(
    rows,
    to_query,
    to_value,
    partial_query,
    partial_value,
    H,
    splits,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_V: tl.constexpr,
):
    """A program for each block of rows and OUT_D and OUT_V channels: adds the chunks' sums up, one after another."""
    rows = Side(*rows)
    b, h, head, _, n = program(H, rows.size, 1, BLOCK_N)
    part = tl.program_id(1)
    live = n < rows.size
    if rows.grad is not None:
        live = load_softmax(rows, head, n)[1] != 0
    dq, dv = None, None
    if to_query is not None:
        dq = add_up(partial_query, head, splits, rows.size, n, arange(part * OUT_D, OUT_D), D)
    if to_value is not None:
        dv = add_up(partial_value, head, splits, rows.size, n, arange(part * OUT_V, OUT_V), V)
    write_gradients(
        rows,
        to_query,
        to_value,
        dq,
        dv,
        scale,
        b,
        h,
        n,
        taking_part(rows, b, h, n),
        live,
        part,
        D,
        V,
        BOTH,
        OUT_D,
        OUT_V,
    )


# Launch --------------------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    rows: int  # of a block
    cols: int  # of a tile
    inner: int  # channels that are multiplied at once; queries and values that fit are loaded once
    outer: int  # channels of a result or gradient that a program holds
    warps: int
    stages: int


# float32 has no tensor cores unless the user allows TF32: small tiles, since each thread multiplies whole rows of them.
# Backward, both softmaxes have five products to the other's three. One rule for all widths: these spill nowhere.
FORWARD = {
    torch.float32: (Configuration(64, 16, 32, 64, 4, 1), Configuration(32, 16, 32, 64, 4, 1)),
    torch.bfloat16: (
        Configuration(64, 32, 64, 128, 4, 2),
        Configuration(128, 32, 64, 128, 8, 2),
        Configuration(32, 32, 64, 128, 4, 2),
    ),
}
BACKWARD = {
    torch.float32: (Configuration(16, 32, 32, 32, 4, 1), Configuration(16, 16, 32, 64, 4, 1)),
    torch.bfloat16: (
        Configuration(32, 32, 64, 64, 4, 2),
        Configuration(64, 16, 64, 64, 8, 2),
        Configuration(16, 32, 64, 64, 4, 2),
    ),
}
BACKWARD_BOTH = {
    torch.float32: (Configuration(16, 32, 32, 32, 4, 1), Configuration(16, 16, 32, 64, 4, 1)),
    torch.bfloat16: (Configuration(16, 32, 64, 64, 4, 2), Configuration(32, 16, 64, 64, 4, 2)),
}
MERGE = {"BLOCK_N": 16, "num_warps": 4}


def compiler_options():
    """ptxas would rather spill a little and fit one more program on a multiprocessor; only it knows the option."""
    nvidia = not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return {"maxnreg": 255} if nvidia else {}


def block(size, most):
    """A power of 2, and what tl.dot takes."""
    return min(max(triton.next_power_of_2(max(size, 1)), 16), most)


class Heads:
    """The sizes of one call, and how a configuration cuts it into programs."""

    def __init__(self, query, channels, scale, both):
        self.like, self.scale = query, scale
        self.dtype = (
            torch.float32 if query.dtype == torch.float32 else torch.bfloat16
        )  # what configurations are listed by
        self.B, self.H, _, self.D = query.shape
        self.V = channels
        dot = (
            tl.float32
            if query.dtype == torch.float32 or INTERPRETED and query.dtype == torch.bfloat16
            else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype]
        )
        tf32 = query.is_cuda and torch.backends.cuda.matmul.allow_tf32
        self.options = {"D": self.D, "V": self.V, "BOTH": both}
        self.dots = {"DOT": dot, "PRECISION": "tf32" if tf32 else "ieee"}
        self.key = (self.D, self.V, tf32, triton.next_power_of_2(max(self.B * self.H, 1)))

    def scratch(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def split(self, programs, columns, tile):
        """(number of chunks, columns of each): enough to fill the device, each long enough to be worth its partial
        sums."""
        wanted = triton.cdiv(4 * processors(self.like), max(programs, 1))
        chunk = tile * max(triton.cdiv(columns, tile * wanted), 4)
        return max(triton.cdiv(columns, chunk), 1), chunk

    def attend(self, configuration, rows, cols, result, pairs=None, bias=None, gate=None, attended=None):
        """Writes result, attended and rows.softmax."""
        block_n = block(rows.size, configuration.rows)
        block_t = block(cols.size, configuration.cols)
        block_d = block(self.D, configuration.inner)
        block_v = block(self.V, configuration.outer)
        blocks = triton.cdiv(rows.size, block_n) * self.B * self.H
        parts = triton.cdiv(self.V, block_v)
        splits, chunk = self.split(blocks * parts, cols.size, block_t)
        stats = partial = None
        if splits > 1:
            stats = self.scratch(self.B * self.H * splits * rows.size, 2)
            partial = self.scratch(self.B * self.H * splits * rows.size, self.V)
        launch(
            attend,
            (blocks * splits, parts),
            rows,
            cols,
            pairs,
            bias,
            gate,
            result,
            attended,
            stats,
            partial,
            self.H,
            splits,
            chunk,
            self.scale,
            **self.options,
            **self.dots,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_V=block_v,
            num_warps=configuration.warps,
            num_stages=configuration.stages,
            **compiler_options(),
        )
        if splits > 1:
            block_v = block(self.V, 64)
            launch(
                merge_attend,
                (triton.cdiv(rows.size, MERGE["BLOCK_N"]) * self.B * self.H, triton.cdiv(self.V, block_v)),
                rows,
                gate,
                result,
                attended,
                stats,
                partial,
                self.H,
                splits,
                V=self.V,
                BLOCK_V=block_v,
                **MERGE,
            )

    def prepare(self, rows, grad, combined, gate=None, grad_gate=None):
        """Writes rows.delta, rows.grad (where there is a gate) and grad_gate."""
        block_v = block(self.V, 128)
        launch(
            prepare,
            triton.cdiv(rows.size, MERGE["BLOCK_N"]) * self.B * self.H,
            rows,
            grad,
            gate,
            combined,
            grad_gate,
            self.H,
            V=self.V,
            BLOCK_V=block_v,
            **MERGE,
        )

    def differentiate(self, configuration, rows, cols, to_query, to_value, pairs=None, bias=None, grad_bias=None):
        """Writes the gradients of rows.query and rows.value, those that are wanted."""
        if to_query is None and to_value is None and grad_bias is None:
            return
        block_n = block(rows.size, configuration.rows)
        block_t = block(cols.size, configuration.cols)
        inner = {"BLOCK_D": block(self.D, configuration.inner), "BLOCK_V": block(self.V, configuration.inner)}
        outer = {"OUT_D": block(self.D, configuration.outer), "OUT_V": block(self.V, configuration.outer)}
        blocks = triton.cdiv(rows.size, block_n) * self.B * self.H
        parts = self.parts(to_query, to_value, outer)
        splits, chunk = self.split(blocks * parts, cols.size, block_t)
        partial = [
            self.scratch(self.B * self.H * splits * rows.size, width) if splits > 1 and to is not None else None
            for to, width in ((to_query, self.D), (to_value, self.V))
        ]
        launch(
            differentiate,
            (blocks * splits, parts),
            rows,
            cols,
            pairs,
            bias,
            grad_bias,
            to_query,
            to_value,
            *partial,
            self.H,
            splits,
            chunk,
            self.scale,
            **self.options,
            **self.dots,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            **inner,
            **outer,
            ALL_ROWS=rows.size <= block_n,
            ALL_COLS=cols.size <= block_t,
            num_warps=configuration.warps,
            num_stages=configuration.stages,
            **compiler_options(),
        )
        if splits > 1 and any(p is not None for p in partial):
            outer = {"OUT_D": block(self.D, 64), "OUT_V": block(self.V, 64)}
            launch(
                merge_gradients,
                (triton.cdiv(rows.size, MERGE["BLOCK_N"]) * self.B * self.H, self.parts(to_query, to_value, outer)),
                rows,
                to_query,
                to_value,
                *partial,
                self.H,
                splits,
                self.scale,
                **self.options,
                **outer,
                **MERGE,
            )

    def parts(self, to_query, to_value, outer):
        return max(
            triton.cdiv(self.D, outer["OUT_D"]) if to_query is not None else 1,
            triton.cdiv(self.V, outer["OUT_V"]) if to_value is not None else 1,
        )
