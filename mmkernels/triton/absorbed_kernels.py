"""Absorbed attention's own kernels; absorbed_attention.py launches them.

The image's features are queries and values of all heads, [B, H, N, D] with a stride of 0 from head to head. s = x.key +
bias; over tokens p = exp(s - top) share, dp = grad.value, ds = p (dp - delta); over positions likewise, with the
features as values. The image's result and its gradient are sums over heads: their programs walk all heads' tokens.
"""

import triton
import triton.language as tl

from .heads_backward import (
    add_up,
    exponential,
    load_softmax,
    spread,
    write_query_gradient,
    write_value_gradient,
)
from .heads_tiles import (
    Place,
    Side,
    adjust,
    arange,
    finite,
    inside,
    last_one,
    load_queries,
    load_tile,
    product,
    program,
    scores,
    store_tile,
    taking_part,
)


@triton.jit
def positions(size, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's sample, its block of positions, and which BLOCK_C of the C channels of what it writes are its own;
    all heads are. Those of the same positions follow each other, so that they find the image in the cache."""
    blocks = tl.cdiv(size, BLOCK_N)
    parts = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block = pid // parts
    return (block // blocks).to(tl.int64), arange(block % blocks * BLOCK_N, BLOCK_N), pid % parts


@triton.jit
def products(x, y, row, col, C: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T of two sides' rows, over their C channels."""
    s = tl.zeros([row.n.shape[0], col.n.shape[0]], tl.float32)
    for start in range(0, C, BLOCK):
        c = arange(start, BLOCK)
        s = product(s, load_tile(x, row, c, C, DOT), load_tile(y, col, c, C, DOT), PRECISION)
    return s


@triton.jit
def attend_heads(
    rows,
    cols,
    bias,
    result,
    H,
    D: tl.constexpr,
    V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program for each block of positions and BLOCK_V channels of the result: an online softmax over each head's
    tokens."""
    rows = Side(*rows)
    cols = Side(*cols)
    b, n, part = positions(rows.size, V, BLOCK_V, BLOCK_N)
    c = arange(part * BLOCK_V, BLOCK_V)
    d = arange(0, BLOCK_D)
    row = Place(b, 0 * b, n, taking_part(rows, b, 0 * b, n))
    exist = inside(rows, row)
    q = None
    if D <= BLOCK_D:
        q = load_queries(rows, row, d, D, True, DOT)
    end = last_one(cols, b, 0 * b, 0, cols.size)
    out = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for head in range(H):
        h = 0 * b + head
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, end, BLOCK_T):
            t = arange(start, BLOCK_T)
            col = Place(b, h, t, taking_part(cols, b, h, t))
            k = None
            if D <= BLOCK_D:
                k = load_tile(cols.query, col, d, D, DOT)
            s = scores(rows, cols, q, k, row, col, D, True, BLOCK_D, DOT, PRECISION)
            s = adjust(s, rows, cols, Place(b, h, n, row.valid), col, None, bias)
            s = tl.where(col.valid[None, :], s, float("-inf"))
            new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp(s - finite(new)[:, None])
            fade = tl.exp(m - finite(new))
            total = total * fade + tl.sum(p, 1)
            v = load_tile(cols.value, col, c, V, DOT)
            acc = tl.dot(p.to(DOT), v, acc * fade[:, None], input_precision=PRECISION)
            m = new
        share = tl.where(total != 0, 1.0 / tl.where(total != 0, total, 1.0), 0.0)
        out += tl.where((total != 0)[:, None], acc * share[:, None], 0.0)
        if part == 0:
            at = rows.softmax + 2 * (b * H + h) * rows.size + n
            tl.store(at, finite(m), exist.valid)
            tl.store(at + rows.size, share, exist.valid)
    store_tile(result, out, exist, c, V)


@triton.jit
def mean_gradients(
    rows,
    cols,
    bias,
    sums,
    H,
    splits,
    chunk,
    D: tl.constexpr,
    V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program for each block of a head's rows and chunk of columns: sums of the rows' weights, and of their gradients
    with the weights. (From the rounded results their quotient can't be found: the image's are sums over heads, and of a
    text that attends to one position nearly nothing is left in the difference.)"""
    rows = Side(*rows)
    cols = Side(*cols)
    b, h, head, split, n = program(H, rows.size, splits, BLOCK_N)
    d = arange(0, BLOCK_D)
    exist = n < rows.size
    row = Place(b, h, n, taking_part(rows, b, h, n))
    top, share = load_softmax(rows, head, n)
    q = None
    if D <= BLOCK_D:
        q = load_queries(rows, row, d, D, True, DOT)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    begin = split * chunk
    for start in range(begin, last_one(cols, b, h, begin, tl.minimum(begin + chunk, cols.size)), BLOCK_T):
        t = arange(start, BLOCK_T)
        col = Place(b, h, t, taking_part(cols, b, h, t))
        k = None
        if D <= BLOCK_D:
            k = load_queries(cols, col, d, D, True, DOT)
        s = scores(rows, cols, q, k, row, col, D, True, BLOCK_D, DOT, PRECISION)
        s = adjust(s, rows, cols, row, col, None, bias)
        p = exponential(tl.where(col.valid[None, :], s, float("-inf")), top[:, None])
        live_row = Place(b, h, n, share != 0)
        dp = products(rows.grad, cols.value, live_row, col, V, BLOCK_V, DOT, PRECISION)
        total += tl.sum(p, 1)
        weighted += tl.sum(p * dp, 1)
    at = sums + 2 * ((head * splits + split) * rows.size + n)
    tl.store(at, total, exist)
    tl.store(at + 1, weighted, exist)


@triton.jit
def differentiate_text(
    rows,
    cols,
    bias,
    to_key,
    to_value,
    to_bias,
    partial_key,
    partial_value,
    partial_bias,
    H,
    splits,
    chunk,
    D: tl.constexpr,
    V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_V: tl.constexpr,
):
    """A program for each block of a head's tokens, chunk of positions, and OUT_D and OUT_V channels of the tokens'
    gradients. rows.grad: the softmax over positions; cols.grad: that over tokens; either or both."""
    rows = Side(*rows)
    cols = Side(*cols)
    b, h, head, split, n = program(H, rows.size, splits, BLOCK_N)
    part = tl.program_id(1)
    out_d = arange(part * OUT_D, OUT_D)
    out_v = arange(part * OUT_V, OUT_V)
    d = arange(0, BLOCK_D)
    row = Place(b, h, n, taking_part(rows, b, h, n))
    row_live = n < rows.size
    if rows.grad is not None:
        row_top, row_share = load_softmax(rows, head, n)
        row_live = row_share != 0
        row_delta = tl.load(rows.delta + head * rows.size + n, row_live, 0)
    q = None
    if D <= BLOCK_D:
        q = load_queries(rows, row, d, D, True, DOT)
    dk = tl.zeros([BLOCK_N, OUT_D], tl.float32)
    dv = tl.zeros([BLOCK_N, OUT_V], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, cols.size), BLOCK_T):
        t = arange(start, BLOCK_T)
        col = Place(b, h, t, taking_part(cols, b, h, t))
        k = None
        if D <= BLOCK_D:
            k = load_queries(cols, col, d, D, True, DOT)
        s = scores(rows, cols, q, k, row, col, D, True, BLOCK_D, DOT, PRECISION)
        s = adjust(s, rows, cols, row, col, None, bias)
        ds = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        if cols.grad is not None:
            col_top, col_share = load_softmax(cols, head, t)
            live_col = Place(b, h, t, col_share != 0)
            p = exponential(tl.where(row.valid[:, None], s, float("-inf")), col_top[None, :])
            if (to_key is not None) | (to_bias is not None):
                dp = products(rows.value, cols.grad, row, live_col, V, BLOCK_V, DOT, PRECISION)
                col_delta = tl.load(cols.delta + head * cols.size + t, live_col.valid, 0)
                ds += p * (dp - col_delta[None, :]) * spread(col_share)[None, :]
                db += tl.sum(ds, 1)
            if to_value is not None:
                g = load_tile(cols.grad, live_col, out_v, V, DOT, False)
                dv = tl.dot((p * col_share[None, :]).to(DOT), g, dv, input_precision=PRECISION)
        if to_key is not None:
            if rows.grad is not None:
                p = exponential(tl.where(col.valid[None, :], s, float("-inf")), row_top[:, None])
                live_row = Place(b, h, n, row_live)
                dp = products(rows.grad, cols.query, live_row, col, D, BLOCK_D, DOT, PRECISION)
                ds += p * (dp - row_delta[:, None]) * spread(row_share)[:, None]
            x = load_queries(cols, col, out_d, D, True, DOT, False)
            dk = tl.dot(ds.to(DOT), x, dk, input_precision=PRECISION)
    if splits == 1:
        if to_key is not None:
            write_query_gradient(rows, to_key, dk, 1.0, row, row_live, out_d, D, True)
        if to_value is not None:
            write_value_gradient(rows, to_value, dv, row, out_v, V)
        if to_bias is not None:
            if part == 0:
                tl.store(to_bias + head * rows.size + n, db, n < rows.size)
    else:
        at = (head * splits + split) * rows.size + n
        exist = n < rows.size
        if to_key is not None:
            tl.store(partial_key + at[:, None] * D + out_d[None, :], dk, exist[:, None] & (out_d < D)[None, :])
        if to_value is not None:
            tl.store(partial_value + at[:, None] * V + out_v[None, :], dv, exist[:, None] & (out_v < V)[None, :])
        if to_bias is not None:
            if part == 0:
                tl.store(partial_bias + at, db, exist)


@triton.jit
def merge_text(
    rows,
    to_key,
    to_value,
    to_bias,
    partial_key,
    partial_value,
    partial_bias,
    H,
    splits,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_V: tl.constexpr,
):
    """A program for each block of a head's tokens and OUT_D and OUT_V channels: adds the chunks' sums up, one after
    another."""
    rows = Side(*rows)
    b, h, head, _, n = program(H, rows.size, 1, BLOCK_N)
    part = tl.program_id(1)
    row = Place(b, h, n, taking_part(rows, b, h, n))
    out_d = arange(part * OUT_D, OUT_D)
    out_v = arange(part * OUT_V, OUT_V)
    dk, dv = None, None
    if to_key is not None:
        dk = add_up(partial_key, head, splits, rows.size, n, out_d, D)
    if to_value is not None:
        dv = add_up(partial_value, head, splits, rows.size, n, out_v, V)
    if to_key is not None:
        write_query_gradient(rows, to_key, dk, 1.0, row, row.valid, out_d, D, True)
    if to_value is not None:
        write_value_gradient(rows, to_value, dv, row, out_v, V)
    if to_bias is not None:
        if part == 0:
            db = tl.zeros([BLOCK_N], tl.float32)
            for split in range(splits):
                db += tl.load(partial_bias + (head * splits + split) * rows.size + n, n < rows.size, 0)
            tl.store(to_bias + head * rows.size + n, db, n < rows.size)


@triton.jit
def differentiate_image(
    rows,
    cols,
    bias,
    to_image,
    H,
    D: tl.constexpr,
    V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OUT_D: tl.constexpr,
):
    """A program for each block of positions and OUT_D channels of the image's gradient, of all heads' tokens."""
    rows = Side(*rows)
    cols = Side(*cols)
    b, n, part = positions(rows.size, D, OUT_D, BLOCK_N)
    out_d = arange(part * OUT_D, OUT_D)
    d = arange(0, BLOCK_D)
    row = Place(b, 0 * b, n, taking_part(rows, b, 0 * b, n))
    q = None
    if D <= BLOCK_D:
        q = load_queries(rows, row, d, D, True, DOT)
    dx = tl.zeros([BLOCK_N, OUT_D], tl.float32)
    for index in range(H):
        h = 0 * b + index
        head = b * H + h
        if rows.grad is not None:
            row_top, row_share = load_softmax(rows, head, n)
            row_delta = tl.load(rows.delta + head * rows.size + n, row_share != 0, 0)
        for start in range(0, cols.size, BLOCK_T):
            t = arange(start, BLOCK_T)
            col = Place(b, h, t, taking_part(cols, b, h, t))
            k = None
            if D <= BLOCK_D:
                k = load_queries(cols, col, d, D, True, DOT)
            s = scores(rows, cols, q, k, row, col, D, True, BLOCK_D, DOT, PRECISION)
            s = adjust(s, rows, cols, Place(b, h, n, row.valid), col, None, bias)
            ds = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            if rows.grad is not None:
                p = exponential(tl.where(col.valid[None, :], s, float("-inf")), row_top[:, None])
                live_row = Place(b, h, n, row_share != 0)
                dp = products(rows.grad, cols.value, live_row, col, V, BLOCK_V, DOT, PRECISION)
                ds += p * (dp - row_delta[:, None]) * spread(row_share)[:, None]
            if cols.grad is not None:
                col_top, col_share = load_softmax(cols, head, t)
                live_col = Place(b, h, t, col_share != 0)
                col_delta = tl.load(cols.delta + head * cols.size + t, live_col.valid, 0)
                p = exponential(tl.where(row.valid[:, None], s, float("-inf")), col_top[None, :])
                dp = products(rows.query, cols.grad, row, live_col, D, BLOCK_D, DOT, PRECISION)
                ds += p * (dp - col_delta[None, :]) * spread(col_share)[None, :]
                g = load_tile(cols.grad, live_col, out_d, D, DOT, False)
                dx = tl.dot((p * col_share[None, :]).to(DOT), g, dx, input_precision=PRECISION)
            k = load_queries(cols, col, out_d, D, True, DOT, False)
            dx = tl.dot(ds.to(DOT), k, dx, input_precision=PRECISION)
    write_query_gradient(rows, to_image, dx, 1.0, row, row.valid, out_d, D, True)
