"""Spatial attention's kernels, backward. spatial_attention.py launches them."""

import triton
import triton.language as tl

from .spatial_tiles import (
    Arguments,
    Gradients,
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
def incoming(a, g, b, h, n, c, valid, C: tl.constexpr):
    """The result's gradient at the tile's positions, or at all of them: [BLOCK_N or 1, BLOCK_C]."""
    if g.result is not None:
        grad = load_tile(a, g.result, b, h, n, c, valid, C)
    elif g.pooled is not None:
        grad = load_vector(g.pooled, b, h, c, C)[None, :]
    else:
        grad = tl.zeros_like(c).to(tl.float32)[None, :]
    return grad


@triton.jit
def weights_and_gradient(a, g, x, grad, b, h, n, valid):
    """The weights, and their whole gradient: through the result, and their own."""
    at = weights_of(a, b, h) + n
    w = tl.load(a.weights + at, valid, 0)
    dw = tl.sum(x * grad, 1)
    if g.weights is not None:
        dw += tl.load(g.weights + at, valid, 0)
    return w, tl.where(valid, dw, 0.0)


@triton.jit
def ratio(p, q):
    return tl.where(q != 0, p / tl.where(q != 0, q, 1.0), 0.0)


@triton.jit
def store_image_grad(a, g, grad, w, ds, b, h, n, c, valid, end, C: tl.constexpr):
    t = load_vector(a.text, b, h, c, C)
    dx = tl.where(valid[:, None], w[:, None] * grad + ds[:, None] * t[None, :], 0.0)
    store_tile(a, g.image, dx, b, h, n, c, end, C)


@triton.jit
def backward_whole(a, g, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """As forward_whole."""
    a = Arguments(*a)
    g = Gradients(*g)
    pid, b, h = split_program(a.s.H)
    first, last = bounds(a, b)
    if last - first > BLOCK_N:
        return
    n, c = first + arange(BLOCK_N), arange(BLOCK_C)
    valid = taking_part(a, b, n, last)
    x = load_tile(a, a.image, b, h, n, c, valid, C)
    grad = incoming(a, g, b, h, n, c, valid, C)
    w, dw = weights_and_gradient(a, g, x, grad, b, h, n, valid)
    ds = a.scale * w * (dw - ratio(tl.sum(w * dw, 0), tl.sum(w, 0)))
    if g.text is not None:
        dt = tl.sum(tl.where(valid, ds, 0.0)[:, None] * x, 0)
        store_vector(g.text, dt, b, h, c, C)
    if g.image is not None:
        store_image_grad(a, g, grad, w, ds, b, h, n, c, valid, last, C)


@triton.jit
def backward_chunks(a, g, stats, partial, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program for each (chunk, head): dw, its mean, the sum of w, and u = sum(w (dw - mean) x), v = sum(w x)."""
    a = Arguments(*a)
    g = Gradients(*g)
    pid, number, h = split_program(a.s.H)
    b, begin, end = locate(a, number)
    c = arange(BLOCK_C)
    mean = tl.full([], 0, tl.float32)
    mass = tl.full([], 0, tl.float32)
    u = tl.zeros([BLOCK_C], tl.float32)
    v = tl.zeros([BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + arange(BLOCK_N)
        valid = taking_part(a, b, n, end)
        x = load_tile(a, a.image, b, h, n, c, valid, C)
        w, dw = weights_and_gradient(a, g, x, incoming(a, g, b, h, n, c, valid, C), b, h, n, valid)
        if g.image is not None:
            tl.store(g.scores + weights_of(a, b, h) + n, dw, n < end)
        tile_mass = tl.sum(w, 0)
        tile_mean = ratio(tl.sum(w * dw, 0), tile_mass)
        new = ratio(mean * mass + tile_mean * tile_mass, mass + tile_mass)
        if partial is not None:
            wx = w[:, None] * x
            tile_v = tl.sum(wx, 0)
            u += (mean - new) * v + tl.sum((dw - tile_mean)[:, None] * wx, 0) + (tile_mean - new) * tile_v
            v += tile_v
        mean, mass = new, mass + tile_mass
    tl.store(stats + pid, mean)
    tl.store(stats + tl.num_programs(0) + pid, mass)
    if partial is not None:
        tl.store(partial + 2 * pid * C + c, u, c < C)
        tl.store(partial + 2 * pid * C + C + c, v, c < C)


@triton.jit
def backward_merge(
    a, g, stats, partial, merged, programs, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A program for each (sample, head) and BLOCK_C channels: the mean of dw over the sample, and the text's
    gradient."""
    a = Arguments(*a)
    g = Gradients(*g)
    pid, b, h = split_program(a.s.H)
    first, last = bounds(a, b)
    if a.offsets is not None:
        if last - first <= a.s.fits:
            return
    k0 = first_chunk(a, b, first)
    k1 = k0 + (last - 1) // a.s.chunk - first // a.s.chunk + 1
    weighted = tl.full([], 0, tl.float32)
    mass = tl.full([], 0, tl.float32)
    for start in range(k0, k1, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = stats + k * a.s.H + h
        chunk_mass = tl.load(at + programs, k < k1, 0)
        weighted += tl.sum(tl.load(at, k < k1, 0) * chunk_mass, 0)
        mass += tl.sum(chunk_mass, 0)
    mean = ratio(weighted, mass)
    if tl.program_id(1) == 0:
        tl.store(merged + pid, mean)
    if g.text is not None:
        c = tl.program_id(1) * BLOCK_C + arange(BLOCK_C)
        dt = tl.zeros([BLOCK_C], tl.float32)
        for start in range(k0, k1, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (k < k1)[:, None] & (c < C)[None, :]
            at = partial + 2 * (k * a.s.H + h)[:, None] * C + c[None, :]
            shift = tl.load(stats + k * a.s.H + h, k < k1, 0) - mean
            dt += tl.sum(tl.load(at, inside, 0) + shift[:, None] * tl.load(at + C, inside, 0), 0)
        store_vector(g.text, dt * a.scale, b, h, c, C)


@triton.jit
def backward_apply(a, g, merged, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program for each (chunk, head): the image's gradient."""
    a = Arguments(*a)
    g = Gradients(*g)
    pid, number, h = split_program(a.s.H)
    b, begin, end = locate(a, number)
    c = arange(BLOCK_C)
    mean = tl.load(merged + b * a.s.H + h)
    for start in range(begin, end, BLOCK_N):
        n = start + arange(BLOCK_N)
        valid = taking_part(a, b, n, end)
        at = weights_of(a, b, h) + n
        w = tl.load(a.weights + at, valid, 0)
        dw = tl.load(g.scores + at, valid, 0)
        store_image_grad(
            a, g, incoming(a, g, b, h, n, c, valid, C), w, a.scale * w * (dw - mean), b, h, n, c, valid, end, C
        )
