"""What the kernels over heads share: where things lie, tiles of scores, which rows and columns take part."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class HeadRows(NamedTuple):
    """[B, H, N, C]: strides as in csrc/tensor.h."""

    data: Any
    b: int
    h: int
    n: int
    c: int


class TokenMask(NamedTuple):
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
    mask: Any  # TokenMask: who takes part in the other side's softmax
    softmax: (
        Any  # [B, H, 2, size], of the softmax that this side's rows have over the other side: the largest score, and
    )
    # one over the sum of the exponentials, 0 where nothing takes part
    grad: Any  # HeadRows: gradient of what that softmax combined
    delta: Any  # [B, H, size]: sum(grad * what that softmax combined)


class Place(NamedTuple):
    """Rows of one head. Of a kernel's own making: none is an argument of a launch."""

    b: Any
    h: Any
    n: Any  # [BLOCK]: their numbers
    valid: Any  # [BLOCK]: which of them are looked at


def head_rows(t):
    return None if t is None else HeadRows(t, *t.stride())


def token_mask(t):
    """bool [B, H, T], or [B, T] for all heads."""
    if t is None:
        return None
    t = t.view(torch.uint8)
    return TokenMask(t, t.stride(0), 0 if t.dim() == 2 else t.stride(1), t.stride(-1))


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
def within(valid, c, C: tl.constexpr, EXACT: tl.constexpr):
    """Rows that count, and channels: EXACT, and where a block divides the channels, a mask for each row is enough."""
    if EXACT and (0 * c.shape[0] + C) % c.shape[0] == 0:  # the interpreter knows no int % constexpr
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (c < C)[None, :]
    return mask


@triton.jit
def load_tile(x, at, c, C: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr = True):
    """Not EXACT: of c as many blocks are walked as the wider of two tensors has."""
    return tl.load(tile(x, at.b, at.h, at.n, c), within(at.valid, c, C, EXACT), 0).to(DOT)


@triton.jit
def store_tile(x, values, at, c, C: tl.constexpr, EXACT: tl.constexpr = True):
    tl.store(tile(x, at.b, at.h, at.n, c), values.to(x.data.dtype.element_ty), within(at.valid, c, C, EXACT))


@triton.jit
def taking_part(side, b, h, n):
    valid = n < side.size
    if side.mask is not None:
        valid = valid & (
            tl.load(side.mask.data + b * side.mask.b + h * side.mask.h + n.to(tl.int64) * side.mask.n, valid, 0) != 0
        )
    return valid


@triton.jit
def inside(side, at):
    """The same rows, masked ones, too."""
    return Place(at.b, at.h, at.n, at.n < side.size)


@triton.jit
def load_queries(side, at, c, D: tl.constexpr, BOTH: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr = True):
    """BOTH softmaxes: one that is masked out has a result of its own, and NaN or Inf counts as 0."""
    if BOTH:
        x = load_tile(side.query, inside(side, at), c, D, DOT, EXACT)
        if side.mask is not None:
            x = tl.where(at.valid[:, None] | (tl.abs(x.to(tl.float32)) < float("inf")), x, 0.0).to(DOT)
    else:
        x = load_tile(side.query, at, c, D, DOT, EXACT)
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
    row,
    col,
    D: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q k^T of the rows at `row` and the columns at `col`. q and k: the tiles where they hold all channels."""
    s = tl.zeros([row.n.shape[0], col.n.shape[0]], tl.float32)
    if D <= BLOCK_D:
        s = product(s, q, k, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            c = arange(start, BLOCK_D)
            x = load_queries(rows, row, c, D, BOTH, DOT)
            s = product(s, x, load_queries(cols, col, c, D, BOTH, DOT), PRECISION)
    return s


@triton.jit
def adjust(s, rows, cols, row, col, pairs, bias):
    """Adds a bias to scores; those of pairs that don't take part are -Inf."""
    exist = inside(rows, row).valid[:, None] & inside(cols, col).valid[None, :]
    if bias is not None:
        s += tl.load(tile(bias, row.b, row.h, row.n, col.n), exist, 0)
    if pairs is not None:
        s = tl.where(tl.load(tile(pairs, row.b, row.h, row.n, col.n), exist, 0) != 0, s, float("-inf"))
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


@triton.jit
def finite(m):
    """The largest of no score, or of scores all -Inf, would make NaN of -Inf - -Inf."""
    return tl.where(m == float("-inf"), 0.0, m)
