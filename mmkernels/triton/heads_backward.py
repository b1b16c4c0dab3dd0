"""Attention over heads, backward. heads.py launches it.

s = scale q.k, p = exp(s - top) share, dp = grad.v, ds = p (dp - delta)
"""

import triton
import triton.language as tl

from .heads_tiles import (
    Place,
    Side,
    adjust,
    arange,
    inside,
    last_one,
    load_queries,
    load_tile,
    product,
    program,
    scores,
    store_tile,
    taking_part,
    tile,
)


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
    some = Place(b, h, n, load_softmax(rows, head, n)[1] != 0)
    exist = inside(rows, some)
    delta = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, V, BLOCK_V):
        c = arange(start, BLOCK_V)
        g = load_tile(grad, some, c, V, tl.float32)
        out = load_tile(combined, some, c, V, tl.float32)
        if grad_gate is not None:
            store_tile(grad_gate, g * out, exist, c, V)
        if gate is not None:
            # Rounded here, too, so that delta belongs to what `differentiate` reads.
            g = (g * load_tile(gate, some, c, V, tl.float32)).to(rows.grad.data.dtype.element_ty)
            store_tile(rows.grad, g, exist, c, V)
            g = g.to(tl.float32)
        delta += tl.sum(g * out, 1)
    tl.store(rows.delta + head * rows.size + n, delta, exist.valid)


@triton.jit
def gradient_product(
    grad,
    value,
    g,
    v,
    row,
    col,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad v^T of the rows at `row` and the columns at `col`. g and v: the tiles where they hold all channels."""
    dp = tl.zeros([row.n.shape[0], col.n.shape[0]], tl.float32)
    if V <= BLOCK_V:
        dp = product(dp, g, v, PRECISION)
    else:
        for start in range(0, V, BLOCK_V):
            c = arange(start, BLOCK_V)
            x = load_tile(grad, row, c, V, DOT)
            dp = product(dp, x, load_tile(value, col, c, V, DOT), PRECISION)
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
def centre(side, b, h, c, C: tl.constexpr, BLOCK: tl.constexpr):
    """[c]: about what the queries that take part have in common: the mean of some."""
    n = arange(0, BLOCK) * tl.cdiv(side.size, BLOCK)
    some = Place(b, h, n, taking_part(side, b, h, n))
    x = load_tile(side.query, some, c, C, tl.float32, False)
    return tl.sum(x, 0) / tl.maximum(tl.sum(some.valid.to(tl.float32), 0), 1.0)


@triton.jit
def write_query_gradient(rows, to_query, dq, scale, at, live, c, D: tl.constexpr, BOTH: tl.constexpr):
    """Exact zeros where nothing takes part, and where a NaN counted as 0. `live`: of the rows' own softmax."""
    exist = inside(rows, at)
    if BOTH:
        if rows.mask is not None:
            x = load_tile(rows.query, exist, c, D, tl.float32, False)
            dq = tl.where(at.valid[:, None] | (tl.abs(x) < float("inf")), dq, 0.0)
    else:
        dq = tl.where((at.valid & live)[:, None], dq, 0.0)
    store_tile(to_query, dq * scale, exist, c, D, False)


@triton.jit
def write_value_gradient(rows, to_value, dv, at, c, V: tl.constexpr):
    store_tile(to_value, tl.where(at.valid[:, None], dv, 0.0), inside(rows, at), c, V, False)


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
    CENTRED: tl.constexpr,
):
    """A program for each block of rows, chunk of columns, and OUT_D and OUT_V channels of the rows' gradients.

    rows.grad: the rows' softmax over the columns; cols.grad: the columns' softmax over the rows; either or both.
    ALL_ROWS, ALL_COLS: a tile holds them all, so that delta is known exactly, where `prepare` had a rounded result.
    CENTRED: the rows' softmax gives ds that add up to 0, but for roundings to 16 bits (delta's, ds's own). What the
    columns have in common is taken away from what those multiply: it may be larger than the gradient.
    """
    rows = Side(*rows)
    cols = Side(*cols)
    b, h, head, split, n = program(H, rows.size, splits, BLOCK_N)
    part = tl.program_id(1)
    out_d = arange(part * OUT_D, OUT_D)
    out_v = arange(part * OUT_V, OUT_V)
    d, c = arange(0, BLOCK_D), arange(0, BLOCK_V)
    row_valid = taking_part(rows, b, h, n)
    row_live = n < rows.size
    if rows.grad is not None:
        row_top, row_share = load_softmax(rows, head, n)
        row_live = row_share != 0
        row_delta = tl.load(rows.delta + head * rows.size + n, row_live, 0)
    row = Place(b, h, n, row_valid)
    live_row = Place(b, h, n, row_live)
    query_row = Place(b, h, n, row_valid if BOTH else row_valid & row_live)
    q, row_g, row_v = None, None, None
    if D <= BLOCK_D:
        q = load_queries(rows, query_row, d, D, BOTH, DOT)
    if V <= BLOCK_V:
        if rows.grad is not None:
            row_g = load_tile(rows.grad, live_row, c, V, DOT)
        if cols.grad is not None:
            row_v = load_tile(rows.value, row, c, V, DOT)
    excess = tl.zeros([BLOCK_N], tl.float32)
    dq = tl.zeros([BLOCK_N, OUT_D], tl.float32)
    dv = tl.zeros([BLOCK_N, OUT_V], tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, cols.size)
    if not BOTH:
        end = last_one(cols, b, h, begin, end)
        end = tl.where(tl.max(query_row.valid.to(tl.int32), 0) != 0, end, begin)
    for start in range(begin, end, BLOCK_T):
        t = arange(start, BLOCK_T)
        col_valid = taking_part(cols, b, h, t)
        col_live = t < cols.size
        if cols.grad is not None:
            col_top, col_share = load_softmax(cols, head, t)
            col_live = col_share != 0
        col = Place(b, h, t, col_valid)
        live_col = Place(b, h, t, col_live)
        query_col = Place(b, h, t, col_valid if BOTH else col_valid & col_live)
        k = None
        if D <= BLOCK_D:
            k = load_queries(cols, query_col, d, D, BOTH, DOT)
        s = scores(rows, cols, q, k, query_row, query_col, D, BOTH, BLOCK_D, DOT, PRECISION)
        s = adjust(s * scale, rows, cols, query_row, query_col, pairs, bias)
        ds = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        if rows.grad is not None:
            p = exponential(tl.where(col_valid[None, :], s, float("-inf")), row_top[:, None])
            v = None
            if V <= BLOCK_V:
                v = load_tile(cols.value, col, c, V, DOT)
            dp = gradient_product(rows.grad, cols.value, row_g, v, live_row, col, V, BLOCK_V, DOT, PRECISION)
            if ALL_COLS:
                row_delta = mean(p, dp, 1)
            ds += p * (dp - row_delta[:, None]) * spread(row_share)[:, None]
            if CENTRED:
                if cols.grad is not None:
                    excess += tl.sum(ds, 1)
        if cols.grad is not None:
            p = exponential(tl.where(row_valid[:, None], s, float("-inf")), col_top[None, :])
            g = None
            if V <= BLOCK_V:
                g = load_tile(cols.grad, live_col, c, V, DOT)
            if to_query is not None:
                dp = gradient_product(rows.value, cols.grad, row_v, g, row, live_col, V, BLOCK_V, DOT, PRECISION)
                if ALL_ROWS:
                    col_delta = mean(p, dp, 0)
                else:
                    col_delta = tl.load(cols.delta + head * cols.size + t, col_live, 0)
                ds += p * (dp - col_delta[None, :]) * spread(col_share)[None, :]
            if to_value is not None:
                if V > BLOCK_V or OUT_V != BLOCK_V:
                    g = load_tile(cols.grad, live_col, out_v, V, DOT, False)
                dv = tl.dot((p * col_share[None, :]).to(DOT), g, dv, input_precision=PRECISION)
        if grad_bias is not None:
            if part == 0:
                tl.store(tile(grad_bias, b, h, n, t), ds, (n < rows.size)[:, None] & (t < cols.size)[None, :])
        if to_query is not None:
            if D > BLOCK_D or OUT_D != BLOCK_D:
                k = load_queries(cols, query_col, out_d, D, BOTH, DOT, False)
            rounded = ds.to(DOT)
            dq = tl.dot(rounded, k, dq, input_precision=PRECISION)
            if CENTRED:
                if cols.grad is None:
                    excess += tl.sum(rounded.to(tl.float32), 1)
    if CENTRED:
        dq -= excess[:, None] * centre(cols, b, h, out_d, D, BLOCK_T)[None, :]
    if splits == 1:
        if to_query is not None:
            write_query_gradient(rows, to_query, dq, scale, row, row_live, out_d, D, BOTH)
        if to_value is not None:
            write_value_gradient(rows, to_value, dv, row, out_v, V)
    else:
        at = (head * splits + split) * rows.size + n
        exist = (n < rows.size)[:, None]
        if to_query is not None:
            tl.store(partial_query + at[:, None] * D + out_d[None, :], dq, exist & (out_d < D)[None, :])
        if to_value is not None:
            tl.store(partial_value + at[:, None] * V + out_v[None, :], dv, exist & (out_v < V)[None, :])


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
    out_d = arange(part * OUT_D, OUT_D)
    out_v = arange(part * OUT_V, OUT_V)
    dq, dv = None, None
    if to_query is not None:
        dq = add_up(partial_query, head, splits, rows.size, n, out_d, D)
    if to_value is not None:
        dv = add_up(partial_value, head, splits, rows.size, n, out_v, V)
    row = Place(b, h, n, taking_part(rows, b, h, n))
    if to_query is not None:
        write_query_gradient(rows, to_query, dq, scale, row, live, out_d, D, BOTH)
    if to_value is not None:
        write_value_gradient(rows, to_value, dv, row, out_v, V)
