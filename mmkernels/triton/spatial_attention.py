"""Spatial attention in Triton. S = bytes of the image features. What the kernels move, against the minimum:

    sample fits a program (`whole`)  multiply: read S, write S; pool: read S; backward: read 2 S (pool: S), write S. The
    minimum.
    larger samples                   `chunks` reads S, and 2 S backward; then `apply` reads S once more to multiply, and
    its
                                     gradient once more backward; pool reads nothing again. What fits the L2 cache comes
                                     from there.

A program holds BLOCK_N whole rows of one head in registers, so that nothing is loaded twice by one kernel; heads are
programs of their own. A larger sample is cut into chunks of s.chunk positions, each a few tiles of BLOCK_N: `chunks`
leaves every chunk's softmax statistics (and weighted sum), `merge` joins a sample's, `apply` finishes the weights.
A packed bag that fits goes through `whole`, the others through chunks; which is which, only the device knows.
The mathematics, and why the sums are centred as they are, is in csrc/cpu/spatial_attention.cpp.

Every sum has a fixed order: no atomics. Indices are 64 bits wide. bfloat16 and float16 are computed in float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..ops.spatial_attention import OPERATION
from .common import (
    MAX_TILE,
    Features,
    Vectors,
    all_have_read,
    define,
    features,
    launch,
    mask_features,
    merge_rows,
    on_device,
    processors,
    require,
    tuned,
    vectors,
)


class Sizes(NamedTuple):
    B: int  # samples (bags)
    N: int  # positions of a sample; packed: rows of all bags
    X: Any  # length of a row of positions; None where positions have one stride
    H: int  # heads
    chunk: int  # positions of a chunk
    fits: int  # a packed bag of at most so many positions is left to `whole`


class Arguments(NamedTuple):
    image: Features
    text: Vectors
    mask: Any  # Features or None
    offsets: Any  # int64 [B + 1] or None
    weights: torch.Tensor  # [B, H, N], packed [H, rows]: until `apply` the scores
    s: Sizes
    scale: float


class Gradients(NamedTuple):
    result: Any  # Features (multiply) or None
    pooled: Any  # Vectors (pool) or None
    weights: Any  # like weights or None
    image: Any  # Features or None: not wanted
    text: Any  # Vectors or None: not wanted
    scores: Any  # scratch like weights, for `apply`


# Where things lie ----------------------------------------------------------------------------------------------------


@triton.jit
def bounds(a, b):
    """A sample's first position, and the one behind its last. Offsets can't be checked without waiting for the device:
    wrong ones give wrong results, but touch no memory that isn't the tensors'."""
    if a.offsets is None:
        first, last = b * 0, b * 0 + a.s.N
    else:
        first = tl.minimum(tl.maximum(tl.load(a.offsets + b), 0), a.s.N)
        last = tl.maximum(tl.minimum(tl.load(a.offsets + b + 1), a.s.N), first)
    return first, last


@triton.jit
def first_chunk(a, b, first):
    """Chunks are cut at multiples of s.chunk. A packed bag that doesn't start at one shares it with the bag in front:
    one more chunk a bag makes room for that, and a bag's first chunk needs no sum over the other bags."""
    if a.offsets is None:
        number = b * tl.cdiv(a.s.N, a.s.chunk)
    else:
        number = first // a.s.chunk + b
    return number


@triton.jit
def locate(a, number):
    """A chunk's sample, its first position and the one behind its last."""
    if a.offsets is None:
        b = number // tl.cdiv(a.s.N, a.s.chunk)
    else:
        b, above = number * 0, number * 0 + a.s.B
        while above - b > 1:
            middle = (b + above) // 2
            start = tl.minimum(tl.maximum(tl.load(a.offsets + middle), 0), a.s.N)
            left = first_chunk(a, middle, start) <= number
            b = tl.where(left, middle, b)
            above = tl.where(left, above, middle)
    first, last = bounds(a, b)
    block = (number - first_chunk(a, b, first) + first // a.s.chunk) * a.s.chunk
    begin = tl.maximum(first, block)
    end = tl.maximum(tl.minimum(last, block + a.s.chunk), begin)
    if a.offsets is not None:
        end = tl.where(last - first <= a.s.fits, begin, end)
    return b, begin, end


@triton.jit
def arange(BLOCK: tl.constexpr):
    """64 bits wide, as all that is multiplied by a stride. (With 32 bits inside a tile the compilers keep every
    element's address over a loop, and need more registers, not fewer.)"""
    return tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def rows(a, f, b, n):
    """Pointers to positions n of a sample."""
    if a.s.X is None:
        place = n * f.x
    else:
        place = n // a.s.X * f.y + n % a.s.X * f.x
    return f.data + b * f.b + place


@triton.jit
def tile(a, f, b, h, n, c, C: tl.constexpr):
    """Pointers to positions n and one head's channels c."""
    return rows(a, f, b, n)[:, None] + (h * C + c)[None, :] * f.d


@triton.jit
def vector(v, b, h, c, C: tl.constexpr):
    return v.data + b * v.b + (h * C + c) * v.d


@triton.jit
def weights_of(a, b, h):
    sample = b if a.offsets is None else b * 0
    return (sample * a.s.H + h) * a.s.N


@triton.jit
def taking_part(a, b, n, end):
    keep = n < end
    if a.mask is not None:
        keep = keep & (tl.load(rows(a, a.mask, b, n), keep, 0) != 0)
    return keep


@triton.jit
def load_tile(a, f, b, h, n, c, keep, C: tl.constexpr):
    return tl.load(tile(a, f, b, h, n, c, C), keep[:, None] & (c < C)[None, :], 0).to(tl.float32)


@triton.jit
def store_tile(a, f, x, b, h, n, c, end, C: tl.constexpr):
    tl.store(tile(a, f, b, h, n, c, C), x.to(f.data.dtype.element_ty), (n < end)[:, None] & (c < C)[None, :])


@triton.jit
def load_vector(v, b, h, c, C: tl.constexpr):
    return tl.load(vector(v, b, h, c, C), c < C, 0).to(tl.float32)


@triton.jit
def store_vector(v, x, b, h, c, C: tl.constexpr):
    tl.store(vector(v, b, h, c, C), x.to(v.data.dtype.element_ty), c < C)


@triton.jit
def split_program(H):
    pid = tl.program_id(0).to(tl.int64)
    return pid, pid // H, pid % H


# Forward -------------------------------------------------------------------------------------------------------------


@triton.jit
def finite(m):
    """The largest of no score, or of scores all -Inf, would make NaN of -Inf - -Inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def normaliser(total, count, RESCALE: tl.constexpr):
    """Scores all -Inf give Inf here and 0 * Inf = NaN as weights, as the definition does; no position gives 0."""
    return tl.where(count > 0, (count if RESCALE else 1.0) / total, 0.0)


@triton.jit
def scores(a, x, keep, b, h, c, C: tl.constexpr):
    t = load_vector(a.text, b, h, c, C)
    return tl.where(keep, tl.sum(x * t[None, :], 1) * a.scale, float("-inf"))


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
    keep = taking_part(a, b, n, last)
    x = load_tile(a, a.image, b, h, n, c, keep, C)
    score = scores(a, x, keep, b, h, c, C)
    e = tl.exp(score - finite(tl.max(score, 0)))
    w = tl.where(keep, e * normaliser(tl.sum(e, 0), tl.sum(keep.to(tl.float32), 0), RESCALE), 0.0)
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
        keep = taking_part(a, b, n, end)
        x = load_tile(a, a.image, b, h, n, c, keep, C)
        score = scores(a, x, keep, b, h, c, C)
        tl.store(a.weights + weights_of(a, b, h) + n, score, n < end)
        new = tl.maximum(m, tl.max(score, 0))
        e = tl.exp(score - finite(new))
        fade = tl.exp(m - finite(new))
        total = total * fade + tl.sum(e, 0)
        count += tl.sum(keep.to(tl.float32), 0)
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
        keep = taking_part(a, b, n, end)
        at = a.weights + weights_of(a, b, h) + n
        w = tl.where(keep, tl.exp(tl.load(at, keep, 0) - m) * factor, 0.0)
        if result is not None:
            x = load_tile(a, a.image, b, h, n, c, keep, C)
        all_have_read()
        tl.store(at, w, n < end)
        if result is not None:
            store_tile(a, result, w[:, None] * x, b, h, n, c, end, C)


# Backward ------------------------------------------------------------------------------------------------------------


@triton.jit
def incoming(a, g, b, h, n, c, keep, C: tl.constexpr):
    """The result's gradient at the tile's positions, or at all of them: [BLOCK_N or 1, BLOCK_C]."""
    if g.result is not None:
        grad = load_tile(a, g.result, b, h, n, c, keep, C)
    elif g.pooled is not None:
        grad = load_vector(g.pooled, b, h, c, C)[None, :]
    else:
        grad = tl.zeros_like(c).to(tl.float32)[None, :]
    return grad


@triton.jit
def weights_and_gradient(a, g, x, grad, b, h, n, keep):
    """The weights, and their whole gradient: through the result, and their own."""
    at = weights_of(a, b, h) + n
    w = tl.load(a.weights + at, keep, 0)
    dw = tl.sum(x * grad, 1)
    if g.weights is not None:
        dw += tl.load(g.weights + at, keep, 0)
    return w, tl.where(keep, dw, 0.0)


@triton.jit
def ratio(p, q):
    return tl.where(q != 0, p / tl.where(q != 0, q, 1.0), 0.0)


@triton.jit
def store_image_grad(a, g, grad, w, ds, b, h, n, c, keep, end, C: tl.constexpr):
    t = load_vector(a.text, b, h, c, C)
    dx = tl.where(keep[:, None], w[:, None] * grad + ds[:, None] * t[None, :], 0.0)
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
    keep = taking_part(a, b, n, last)
    x = load_tile(a, a.image, b, h, n, c, keep, C)
    grad = incoming(a, g, b, h, n, c, keep, C)
    w, dw = weights_and_gradient(a, g, x, grad, b, h, n, keep)
    ds = a.scale * w * (dw - ratio(tl.sum(w * dw, 0), tl.sum(w, 0)))
    if g.text is not None:
        dt = tl.sum(tl.where(keep, ds, 0.0)[:, None] * x, 0)
        store_vector(g.text, dt, b, h, c, C)
    if g.image is not None:
        store_image_grad(a, g, grad, w, ds, b, h, n, c, keep, last, C)


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
        keep = taking_part(a, b, n, end)
        x = load_tile(a, a.image, b, h, n, c, keep, C)
        w, dw = weights_and_gradient(a, g, x, incoming(a, g, b, h, n, c, keep, C), b, h, n, keep)
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
        keep = taking_part(a, b, n, end)
        at = weights_of(a, b, h) + n
        w = tl.load(a.weights + at, keep, 0)
        dw = tl.load(g.scores + at, keep, 0)
        store_image_grad(
            a, g, incoming(a, g, b, h, n, c, keep, C), w, a.scale * w * (dw - mean), b, h, n, c, keep, end, C
        )


# Launch --------------------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    tile: int  # elements of one tensor that a program holds at once
    warps: int


FORWARD = (Configuration(8192, 8), Configuration(8192, 4), Configuration(4096, 4), Configuration(8192, 16))
BACKWARD = (
    Configuration(4096, 4),
    Configuration(8192, 8),
    Configuration(4096, 8),
    Configuration(2048, 4),
    Configuration(8192, 16),
)
MERGE = {"BLOCK_K": 32, "BLOCK_C": 64, "num_warps": 4}


class Problem:
    """The arguments of one call, checked, and how a configuration cuts it into programs."""

    def __init__(self, image, text, mask, offsets, scale, num_heads, weights=None, *others):
        """`others`: further tensors like image, or None, that are walked with it."""
        packed = offsets is not None
        device = image.device
        if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"image must be float32, bfloat16 or float16, got {image.dtype}")
        if image.dim() not in ((2,) if packed else (3, 4)):
            raise RuntimeError("image must be [B, N, D] or [B, D, Y, X], or [rows, D] with offsets")
        self.image = image
        self.B = offsets.shape[0] - 1 if packed else image.shape[0]
        self.D = image.shape[1 if image.dim() != 3 else 2]
        height, width = image.shape[2:] if image.dim() == 4 else (1, image.shape[0 if packed else 1])
        self.N, self.H = height * width, num_heads
        if self.D < 1 or self.H < 1 or self.D % self.H:
            raise RuntimeError(f"num_heads must divide image's {self.D} channels, got {num_heads}")
        self.C = self.D // self.H
        self.block_c = triton.next_power_of_2(self.C)
        if self.block_c > MAX_TILE:
            raise RuntimeError(f"image may have at most {MAX_TILE} channels a head in Triton, got {self.C}")
        require(text, "text", image, (self.B, self.D))
        if mask is not None:
            require(
                mask,
                "mask",
                image,
                image.shape[:1] if packed else image.shape[:2] if image.dim() == 3 else (self.B, height, width),
                torch.bool,
            )
            mask = mask_features(mask, packed)
        if packed:
            require(offsets, "offsets", image, (self.B + 1,), torch.int64)
            offsets = offsets.contiguous()
        self.weights_shape = (self.H, self.N) if packed else (self.B, self.H, self.N)
        if weights is None:
            weights = torch.empty(self.weights_shape, dtype=torch.float32, device=device)
        require(weights, "weights", image, self.weights_shape, torch.float32)
        X, image, mask, *self.others = merge_rows(
            height, width, features(image), mask, *(None if t is None else features(t) for t in others)
        )
        self.planes = image.x == 1 and image.d != 1
        self.a = Arguments(
            image,
            vectors(text),
            mask,
            offsets,
            weights.contiguous(),
            Sizes(self.B, self.N, X, self.H, 1, 1),
            float(scale),
        )
        self.key = (
            self.C,
            self.H,
            packed,
            self.planes,
            X is None,
            mask is None,
            triton.next_power_of_2(max(self.B, 1)),
            triton.next_power_of_2(max(self.N, 1)),
        )

    def cut(self, configuration, largest_whole):
        """The arguments, the number of samples that go through `whole` and through chunks, the number of chunks, and
        the kernels' options for both."""
        packed = self.a.offsets is not None
        longest = triton.next_power_of_2(max(self.N, 1))
        block_n = min(max(configuration.tile // self.block_c, 1), longest, 1024)
        fits = min(max(largest_whole // self.block_c, 1), longest, 1024)
        # Enough chunks to fill the device eight times; where positions are contiguous, a chunk has a cache line of
        # them, so that what a narrow tile leaves of a line is read by the same program's next one, from the first-level
        # cache.
        tiles = triton.cdiv(self.N, block_n) * self.H * (1 if packed else self.B)
        chunk = block_n * min(max(tiles // (8 * processors(self.image)), 1), 16)
        chunk = max(chunk, 128 // self.image.element_size() if self.planes else 1)
        a = self.a._replace(s=self.a.s._replace(chunk=chunk, fits=fits))

        def options(block_n):
            warps = min(max(configuration.warps, block_n * self.block_c // 2048), 16)
            return {"C": self.C, "BLOCK_N": block_n, "BLOCK_C": self.block_c, "num_warps": warps}

        chunked = fits < self.N
        whole = self.B if packed or not chunked else 0
        chunks = (
            triton.cdiv(self.N, chunk) * (1 if packed else self.B) + (self.B if packed else 0)
            if chunked and self.B
            else 0
        )
        return a, whole, self.B if chunked else 0, chunks, options(fits), options(block_n)

    def scratch(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.image.device)


def forward_into(result, image, text, mask, offsets, scale, num_heads, pool, rescale):
    """Writes the result and returns the weights."""
    problem = Problem(image, text, mask, offsets, scale, num_heads, None, None if pool else result)
    require(result, "out", image, text.shape if pool else image.shape)
    H, C = problem.H, problem.C

    def run(configuration, result):
        a, whole, chunked, chunks, whole_options, options = problem.cut(configuration, 16384)
        stats = problem.scratch(3, chunks * H)
        merged = problem.scratch(chunked * H, 2)
        partial = problem.scratch(chunks * H, C) if pool else None
        multiplied, pooled = (None, vectors(result)) if pool else (problem.others[0]._replace(data=result), None)
        launch(forward_whole, whole * H, a, multiplied, pooled, RESCALE=rescale, **whole_options)
        launch(forward_chunks, chunks * H, a, stats, partial, **options)
        launch(
            forward_merge,
            (chunked * H, triton.cdiv(C, MERGE["BLOCK_C"]) if pool else 1),
            a,
            stats,
            partial,
            pooled,
            merged,
            chunks * H,
            RESCALE=rescale,
            C=C,
            **MERGE,
        )
        launch(forward_apply, chunks * H, a, multiplied, merged, **options)

    with on_device(image):
        # Measuring repeats the work: in a tensor of its own, since the result may be the image itself.
        configuration = tuned(
            ("forward", pool, *problem.key),
            FORWARD,
            image,
            lambda configuration: run(
                configuration,
                torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device),
            ),
        )
        run(configuration, result)
    return problem.a.weights


def forward(image, text, mask, offsets, scale, num_heads, pool, rescale):
    result = torch.empty_like(text, memory_format=torch.contiguous_format) if pool else torch.empty_like(image)
    weights = forward_into(result, image, text, mask, offsets, scale, num_heads, pool, rescale)
    return result, weights


def forward_out(image, text, mask, offsets, scale, num_heads, pool, rescale, out):
    return forward_into(out, image, text, mask, offsets, scale, num_heads, pool, rescale)


def backward(
    grad_result,
    grad_weights,
    image,
    text,
    mask,
    offsets,
    weights,
    scale,
    num_heads,
    pool,
    rescale,
    need_image_grad,
    need_text_grad,
):
    grad_image = torch.empty_like(image) if need_image_grad else image.new_empty(0)
    grad_text = torch.empty_like(text, memory_format=torch.contiguous_format) if need_text_grad else text.new_empty(0)
    if not (need_image_grad or need_text_grad):
        return grad_image, grad_text
    if grad_result is not None:
        require(grad_result, "grad_result", image, text.shape if pool else image.shape)
    problem = Problem(
        image,
        text,
        mask,
        offsets,
        scale,
        num_heads,
        weights,
        None if pool else grad_result,
        grad_image if need_image_grad else None,
    )
    if grad_weights is not None:
        require(grad_weights, "grad_weights", image, problem.weights_shape, torch.float32)
        grad_weights = grad_weights.contiguous()
    H, C = problem.H, problem.C
    g = Gradients(
        problem.others[0],
        vectors(grad_result) if pool and grad_result is not None else None,
        grad_weights,
        problem.others[1],
        vectors(grad_text) if need_text_grad else None,
        None,
    )

    def run(configuration):
        a, whole, chunked, chunks, whole_options, options = problem.cut(configuration, 8192)
        stats = problem.scratch(2, chunks * H)
        merged = problem.scratch(chunked * H)
        partial = problem.scratch(chunks * H, 2, C) if need_text_grad else None
        scored = g._replace(scores=problem.scratch(*problem.weights_shape)) if need_image_grad and chunks else g
        launch(backward_whole, whole * H, a, g, **whole_options)
        launch(backward_chunks, chunks * H, a, scored, stats, partial, **options)
        launch(
            backward_merge,
            (chunked * H, triton.cdiv(C, MERGE["BLOCK_C"]) if need_text_grad else 1),
            a,
            g,
            stats,
            partial,
            merged,
            chunks * H,
            C=C,
            **MERGE,
        )
        if need_image_grad:
            launch(backward_apply, chunks * H, a, scored, merged, **options)

    with on_device(image):
        run(tuned(("backward", pool, need_image_grad, need_text_grad, *problem.key), BACKWARD, image, run))
    return grad_image, grad_text


define(
    "spatial_attention_triton(Tensor image, Tensor text, Tensor? mask, Tensor? offsets, float scale, int num_heads, bool pool, "
    "bool rescale) -> (Tensor, Tensor)",
    forward,
)
define(
    "spatial_attention_triton_out(Tensor image, Tensor text, Tensor? mask, Tensor? offsets, float scale, int num_heads, bool pool, "
    "bool rescale, Tensor(a!) out) -> Tensor",
    forward_out,
)
define(
    "spatial_attention_triton_backward(Tensor? grad_result, Tensor? grad_weights, Tensor image, Tensor text, Tensor? mask, "
    "Tensor? offsets, Tensor weights, float scale, int num_heads, bool pool, bool rescale, bool need_image_grad, "
    "bool need_text_grad) -> (Tensor, Tensor)",
    backward,
)
OPERATION.register("spatial_attention_triton", "triton")
