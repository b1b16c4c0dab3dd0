"""The kernels of deformable attention. A tile is queries x points x channels: of each point the four positions around
it, whose rows are gathered."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .heads_tiles import HeadRows, arange, finite, program, taking_part


class PointRows(NamedTuple):
    """[B, Q, H, K], and with c from x to y."""

    data: Any
    b: int
    q: int
    h: int
    k: int
    c: int


class Sampling(NamedTuple):
    """What says where each query and head samples, and how much each sample counts."""

    size: int  # positions of all levels
    value: HeadRows
    mask: Any  # TokenMask or None
    locations: PointRows
    scores: PointRows
    softmax: Any  # float32 [B, Q, H, 2], the largest score and one over the sum; None where scores are the weights
    points: torch.Tensor  # int32 [4, K]: of each point's level width, height, first position and first cell
    H: int
    Q: int
    K: int


class Places(NamedTuple):
    """Where points lie."""

    near: Any  # has a position around it that is inside
    column: Any  # of the position to the upper left, -1 outside
    row: Any
    x: Any  # from there, below 1
    y: Any
    width: Any
    height: Any
    first: Any


# Where things lie ----------------------------------------------------------------------------------------------------


@triton.jit
def elements(x, b, h, q, k):
    return x.data + b * x.b + h * x.h + q.to(tl.int64) * x.q + k.to(tl.int64) * x.k


@triton.jit
def load_softmax(a, b, h, q, inside):
    at = a.softmax + ((b * a.Q + q) * a.H + h) * 2
    return tl.load(at, inside, 0), tl.load(at + 1, inside, 0)


@triton.jit
def load_weights(a, b, h, q, k, inside, top, share):
    """0 where there is no point. `top`, `share`: of the softmax, if there is one."""
    at = elements(a.scores, b, h, q, k)
    if a.softmax is None:
        weights = tl.load(at, inside, 0).to(tl.float32)
    else:
        weights = tl.exp(tl.load(at, inside, float("-inf")).to(tl.float32) - finite(top)) * share
    return weights


@triton.jit
def locate(a, b, h, q, k, inside):
    """A position's center is half a pixel from its edges. NaN is near nothing."""
    at = elements(a.locations, b, h, q, k)
    width = tl.load(a.points + k, k < a.K, 0)
    height = tl.load(a.points + a.K + k, k < a.K, 0)
    first = tl.load(a.points + 2 * a.K + k, k < a.K, 0)
    x = tl.load(at, inside, float("nan")).to(tl.float32) * width.to(tl.float32) - 0.5
    y = tl.load(at + a.locations.c, inside, float("nan")).to(tl.float32) * height.to(tl.float32) - 0.5
    near = (x >= -1.0) & (x < width.to(tl.float32)) & (y >= -1.0) & (y < height.to(tl.float32))
    x = tl.where(near, x, 0.0)
    y = tl.where(near, y, 0.0)
    left = tl.floor(x)
    upper = tl.floor(y)
    return Places(near, left.to(tl.int32), upper.to(tl.int32), x - left, y - upper, width, height, first)


@triton.jit
def corner(a, b, places, right: tl.constexpr, below: tl.constexpr):
    """One of the four around each point, and whether it is there and takes part."""
    column = places.column + right
    row = places.row + below
    valid = places.near & (column >= 0) & (column < places.width) & (row >= 0) & (row < places.height)
    position = places.first + row * places.width + column
    if a.mask is not None:
        valid = valid & (tl.load(a.mask.data + b * a.mask.b + position.to(tl.int64) * a.mask.n, valid, 0) != 0)
    return position, valid


@triton.jit
def portion(fraction, far: tl.constexpr):
    """How much the near or the far one of two neighbours counts."""
    if far:
        part = fraction
    else:
        part = 1.0 - fraction
    return part


@triton.jit
def rows(x, b, h, n, c):
    return x.data + b * x.b + h * x.h + n.to(tl.int64)[:, :, None] * x.n + c.to(tl.int64)[None, None, :] * x.c


@triton.jit
def load_rows(x, b, h, n, c, valid, D: tl.constexpr):
    return tl.load(rows(x, b, h, n, c), valid[:, :, None] & (c < D)[None, None, :], 0).to(tl.float32)


# Forward -------------------------------------------------------------------------------------------------------------


@triton.jit
def statistics(a, b, h, q, BLOCK_K: tl.constexpr):
    """The largest score of each query, and one over the sum of exponentials."""
    top = tl.full(q.shape, float("-inf"), tl.float32)
    total = tl.zeros(q.shape, tl.float32)
    for start in range(0, a.K, BLOCK_K):
        k = arange(start, BLOCK_K)[None, :]
        inside = (q < a.Q) & (k < a.K)
        x = tl.load(elements(a.scores, b, h, q, k), inside, float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 1)[:, None])
        total = total * tl.exp(top - finite(new)) + tl.sum(tl.exp(x - finite(new)), 1)[:, None]
        top = new
    return top, tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))


@triton.jit
def sample(a, result, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program for each block of a head's queries and BLOCK_D channels."""
    a = Sampling(*a)
    b, h, _, _, n = program(a.H, a.Q, 1, BLOCK_N)
    part = tl.program_id(1)
    d = arange(part * BLOCK_D, BLOCK_D)
    q = n[:, None]
    top = tl.zeros([BLOCK_N, 1], tl.float32)
    share = top
    if a.softmax is not None:
        top, share = statistics(a, b, h, q, BLOCK_K)
        if part == 0:
            at = a.softmax + ((b * a.Q + q) * a.H + h) * 2
            tl.store(at, top, q < a.Q)
            tl.store(at + 1, share, q < a.Q)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, a.K, BLOCK_K):
        k = arange(start, BLOCK_K)[None, :]
        inside = (q < a.Q) & (k < a.K)
        places = locate(a, b, h, q, k, inside)
        weight = load_weights(a, b, h, q, k, inside, top, share)
        # Corners weighed one by one would cancel to NaN where the weight is Inf.
        samples = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float32)
        for below in tl.static_range(2):
            for right in tl.static_range(2):
                position, valid = corner(a, b, places, right, below)
                of_corner = portion(places.x, right) * portion(places.y, below)
                samples += of_corner[:, :, None] * load_rows(a.value, b, h, position, d, valid, D)
        total += tl.sum(weight[:, :, None] * samples, 1)
    at = result.data + b * result.b + h * result.h + q.to(tl.int64) * result.n + d.to(tl.int64)[None, :] * result.c
    tl.store(at, total.to(result.data.dtype.element_ty), (q < a.Q) & (d < D)[None, :])


# Backward ------------------------------------------------------------------------------------------------------------


@triton.jit
def gradients(a, grad, to_value, places, weight, b, h, q, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of each point's weight, and along x and y of its place in pixels: products of the result's gradient with the rows
    of the four corners. Adds to `to_value`, if it is given."""
    of_weight = tl.zeros(weight.shape, tl.float32)
    along_x = tl.zeros(weight.shape, tl.float32)
    along_y = tl.zeros(weight.shape, tl.float32)
    for start in range(0, D, BLOCK_D):
        d = arange(start, BLOCK_D)
        g = load_rows(grad, b, h, q, d, q < a.Q, D)
        for below in tl.static_range(2):
            for right in tl.static_range(2):
                position, valid = corner(a, b, places, right, below)
                of_x = portion(places.x, right)
                of_y = portion(places.y, below)
                product = tl.sum(g * load_rows(a.value, b, h, position, d, valid, D), 2)
                of_weight += of_x * of_y * product
                along_x += (2 * right - 1) * of_y * product
                along_y += (2 * below - 1) * of_x * product
                if to_value is not None:
                    tl.atomic_add(
                        rows(to_value, b, h, position, d),
                        (weight * of_x * of_y)[:, :, None] * g,
                        valid[:, :, None] & (d < D)[None, None, :],
                        sem="relaxed",
                    )
    return of_weight, along_x, along_y


@triton.jit
def differentiate(
    a,
    grad,
    to_locations,
    to_scores,
    to_value,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program for each block of a head's queries. WHOLE: a block holds all points; else the mean of the weights'
    gradients has a walk of its own."""
    a = Sampling(*a)
    b, h, _, _, n = program(a.H, a.Q, 1, BLOCK_N)
    q = n[:, None]
    top = tl.zeros([BLOCK_N, 1], tl.float32)
    share = top
    mean = top
    if a.softmax is not None:
        top, share = load_softmax(a, b, h, q, q < a.Q)
        if to_scores is not None and not WHOLE:
            for start in range(0, a.K, BLOCK_K):
                k = arange(start, BLOCK_K)[None, :]
                inside = (q < a.Q) & (k < a.K)
                places = locate(a, b, h, q, k, inside)
                weight = load_weights(a, b, h, q, k, inside, top, share)
                of_weight, _, _ = gradients(a, grad, None, places, weight, b, h, q, D, BLOCK_D)
                mean += tl.sum(weight * of_weight, 1)[:, None]
    for start in range(0, a.K, BLOCK_K):
        k = arange(start, BLOCK_K)[None, :]
        inside = (q < a.Q) & (k < a.K)
        places = locate(a, b, h, q, k, inside)
        weight = load_weights(a, b, h, q, k, inside, top, share)
        of_weight, along_x, along_y = gradients(a, grad, to_value, places, weight, b, h, q, D, BLOCK_D)
        if to_scores is not None:
            if a.softmax is not None:
                if WHOLE:
                    mean = tl.sum(weight * of_weight, 1)[:, None]
                of_weight = weight * (of_weight - mean)
            tl.store(elements(to_scores, b, h, q, k), of_weight.to(to_scores.data.dtype.element_ty), inside)
        if to_locations is not None:
            dtype: tl.constexpr = to_locations.data.dtype.element_ty
            at = elements(to_locations, b, h, q, k)
            of_x = tl.where(places.near, weight * places.width.to(tl.float32) * along_x, 0.0)
            of_y = tl.where(places.near, weight * places.height.to(tl.float32) * along_y, 0.0)
            tl.store(at, of_x.to(dtype), inside)
            tl.store(at + to_locations.c, of_y.to(dtype), inside)


# The value's gradient in a fixed order: every point is in a cell, between four positions, some of them outside; a
# position has the points of the four cells around it. A level of Y x X positions has (Y + 1) x (X + 1) cells.


@triton.jit
def find_cells(a, to_cells, cells, nowhere, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each point's cell, [B, Q, H, K], counted through all heads, of which each has so many `cells`."""
    a = Sampling(*a)
    b, h, head, _, n = program(a.H, a.Q, 1, BLOCK_N)
    q = n[:, None]
    for start in range(0, a.K, BLOCK_K):
        k = arange(start, BLOCK_K)[None, :]
        inside = (q < a.Q) & (k < a.K)
        places = locate(a, b, h, q, k, inside)
        first = tl.load(a.points + 3 * a.K + k, k < a.K, 0)
        cell = first + (places.row + 1) * (places.width + 1) + places.column + 1
        at = to_cells + ((b * a.Q + q) * a.H + h) * a.K + k
        cell = tl.where(places.near, head * cells + cell, nowhere)
        tl.store(at, cell.to(to_cells.dtype.element_ty), inside)


@triton.jit
def add_cells(
    a,
    grad,
    to_value,
    order,
    begins,
    levels,
    L,
    cells,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program for each block of a head's positions and BLOCK_D channels: goes through the points of their cells,
    BLOCK_K of each at once. `order`: all points, cell by cell; `begins`: of each cell in that order; `levels`: int32
    [3, L], width, first position and first cell of each."""
    a = Sampling(*a)
    b, h, head, _, s = program(a.H, a.size, 1, BLOCK_N)
    d = arange(tl.program_id(1) * BLOCK_D, BLOCK_D)
    valid = taking_part(a, b, h, s)
    width = tl.full([BLOCK_N], 1, tl.int32)
    position = s
    cell = tl.zeros([BLOCK_N], tl.int32)
    for level in range(L):
        first = tl.load(levels + L + level)
        here = s >= first
        width = tl.where(here, tl.load(levels + level), width)
        position = tl.where(here, s - first, position)
        cell = tl.where(here, tl.load(levels + 2 * L + level), cell)
    # Of the cell to the lower right.
    cell += (position // width + 1) * (width + 1) + position % width + 1
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            around = begins + head * cells + cell - below * (width + 1) - right
            begin = tl.load(around, valid, 0)
            end = tl.load(around + 1, valid, 0)
            for start in range(0, tl.max(end - begin, 0), BLOCK_K):
                place = (begin + start)[:, None] + arange(0, BLOCK_K)[None, :]
                inside = place < end[:, None]
                # 64-bit divisions are calls, with a stack
                point = (tl.load(order + place, inside, 0) - b * a.Q * a.H * a.K).to(tl.int32)
                k = point % a.K
                q = point // a.K // a.H
                top = tl.zeros(q.shape, tl.float32)
                share = top
                if a.softmax is not None:
                    top, share = load_softmax(a, b, h, q, inside)
                places = locate(a, b, h, q, k, inside)
                weight = load_weights(a, b, h, q, k, inside, top, share)
                of_corner = weight * portion(places.x, right) * portion(places.y, below)
                total += tl.sum(of_corner[:, :, None] * load_rows(grad, b, h, q, d, inside, D), 1)
    n = s.to(tl.int64)[:, None]
    at = to_value.data + b * to_value.b + h * to_value.h + n * to_value.n + d.to(tl.int64)[None, :] * to_value.c
    tl.store(at, total.to(to_value.data.dtype.element_ty), (s < a.size)[:, None] & (d < D)[None, :])
