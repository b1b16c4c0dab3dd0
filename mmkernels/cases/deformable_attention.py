"""Sizes, levels, points, layouts, masks, options, and locations of every kind."""

import copy

import torch

from .common import SMALL, Case
from .heads import HEADS
from .layouts import MASKS, contiguous, mask_random

OUTPUTS = ("result",)

# B, H, d, Q, points a level, levels: sizes that fit no vector, tile or block.
SIZES = (
    (1, 1, 1, 1, 1, ((1, 1),)),
    (2, 1, 3, 1, 1, ((3, 1),)),
    (1, 2, 8, 3, 2, ((1, 7), (5, 3))),
    (2, 3, 7, 5, 4, ((5, 6), (3, 3), (1, 1))),
    (1, 2, 32, 17, 4, ((6, 5), (3, 3), (2, 2), (1, 1))),
    (1, 1, 33, 9, 5, ((9, 4), (2, 9))),
    (2, 2, 16, 10, 3, ((5, 5), (3, 2))),
    (1, 9, 5, 6, 1, ((4, 4), (3, 3), (2, 2), (2, 1), (1, 1))),
    (3, 2, 24, 8, 9, ((7, 3),)),
    (1, 1, 100, 6, 2, ((3, 3), (2, 2))),
)
LARGE = (
    (1, 8, 32, 1023, 4, ((31, 42), (16, 21), (8, 11), (4, 6))),
    (2, 3, 65, 113, 3, ((20, 17), (9, 8))),
    (1, 2, 257, 203, 4, ((13, 11), (7, 6))),
    (3, 5, 12, 300, 8, ((16, 16), (8, 8), (4, 4))),
    (1, 1, 8, 3001, 4, ((113, 97),)),
    (1, 1, 300, 97, 9, ((23, 31), (5, 7))),
)
SOME = (2, 2, 12, 9, 3, ((5, 4), (3, 2)))


def generate():
    def case(
        group,
        name,
        shape,
        *,
        make=contiguous,
        make_queries=contiguous,
        mask=None,
        wide=(),
        gain=1,
        locate=within,
        points=None,
        **options,
    ):
        def build(draw):
            batch, heads, channels, queries, of_level, levels = shape
            draws = {False: draw, True: copy.copy(draw)}
            if draw.dtype != torch.float64:
                draws[True].dtype = torch.float32
            positions = sum(y * x for y, x in levels)
            of_points = (len(levels), of_level) if points is None else (sum(points),)
            scores = make_queries(draws["scores" in wide], batch, queries, heads, *of_points)
            arguments = {
                "value": make(draw, batch, positions, heads, channels),
                "spatial_shapes": levels,
                "locations": locations(draws["locations" in wide], shape, points, locate),
                "scores": (scores * gain).to(scores.dtype) if gain != 1 else scores,
                **options,
            }
            if make_queries is not contiguous:
                arguments["locations"] = _apart(arguments["locations"])
            if points is not None:
                arguments["points"] = points
            if mask is not None:
                arguments["mask"] = mask(draw, batch, positions)
            return arguments

        batch, heads, channels, queries, of_level, levels = shape
        count = len(levels) * of_level if points is None else sum(points)
        small = batch * heads * queries * count * channels <= 2 * SMALL
        return Case(f"{group}: {name}", group, build, small)

    for i, shape in enumerate((*SIZES, *LARGE)):
        *sizes, levels = shape
        name = "x".join(map(str, (*sizes, *(f"{y},{x}" for y, x in levels))))
        yield case("sizes" if i < len(SIZES) else "large", name, shape)
    for b, h, q, p in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        yield case("empty", f"{b}x{h}x{q}x{p}", (b, h, 5, q, p, ((2, 3), (1, 1))))

    for make in HEADS:
        yield case("views", f"value {make.__name__}", SOME, make=make)
        yield case("views", f"queries {make.__name__}", SOME, make_queries=make, points=(2, 4))
    for name, mask in MASKS.items():
        yield case("masks", name, SOME, mask=mask)
        yield case("masks", f"{name}, weights given", SOME, mask=mask, softmax=False)
    yield case("masks", "random, large", (2, 4, 32, 203, 4, ((20, 17), (9, 8))), mask=mask_random)
    for points in ((4, 2), (0, 3), (5, 0), (0, 0), (1, 17)):
        yield case("points", ",".join(map(str, points)), SOME, points=points)
        yield case("points", f"{','.join(map(str, points))}, mask", SOME, points=points, mask=mask_random)
    yield case("points", "many", (1, *SOME[1:]), points=(40, 3))
    yield case("points", "5 levels", (1, 2, 32, 9, 0, ((4, 4), (3, 3), (2, 2), (2, 1), (1, 1))), points=(1, 2, 3, 4, 5))
    for wide in (("locations",), ("scores",), ("locations", "scores")):
        for softmax in (True, False):
            ending = "" if softmax else ", weights given"
            yield case("dtypes", f"{' and '.join(wide)} in float32{ending}", SOME, wide=wide, softmax=softmax)
    yield case("extremes", "large scores", SOME, gain=8)
    yield case("extremes", "scores that choose one", SOME, gain=200)
    for locate in (around, on_edges, far_outside, not_finite):
        yield case("locations", locate.__name__, (2, 2, 12, 20, 3, ((8, 4), (2, 16))), locate=locate)
        yield case(
            "locations", f"{locate.__name__}, 5 by 3", (1, 2, 7, 20, 3, ((5, 3), (1, 1))), locate=locate, softmax=False
        )


def arguments(draw, shape, locate):
    """As many points on every level, and nothing else; of a shape as in SIZES."""
    batch, heads, channels, queries, points, levels = shape
    return {
        "value": draw.normal(batch, sum(y * x for y, x in levels), heads, channels),
        "spatial_shapes": levels,
        "locations": locations(draw, shape, locate=locate),
        "scores": draw.normal(batch, queries, heads, len(levels), points),
    }


# Locations, each of (a draw of numbers in [0, 1) of a shape [..., 2], sizes (x, y) likewise). None is so near to the
# center of a position, where samples have a kink, that rounding would take it to the other side; on_edges have them
# where nothing is rounded.


def within(uniform, sizes):
    return _clear(uniform * sizes - 0.5, sizes)


def around(uniform, sizes):
    """A third lies outside, up to half of an image away."""
    return _clear((2 * uniform - 0.5) * sizes - 0.5, sizes)


def on_edges(uniform, sizes):
    """On edges and centers of positions, and half a position outside; exact where sizes are powers of 2."""
    half = (uniform * (2 * sizes + 3)).floor() - 1
    exact = (sizes.log2() % 1 == 0).all(-1, keepdim=True)
    return torch.where(exact, half / (2 * sizes), _clear(uniform * sizes - 0.5, sizes))


def far_outside(uniform, sizes):
    """Every other one: 60,000 times the image's size away, as far as float16 reaches."""
    far = (uniform - 0.5).sign() * 60_000
    return torch.where(_every(uniform, 2), far, within(uniform, sizes))


def not_finite(uniform, sizes):
    """Of every four one is NaN and one Inf or -Inf, in x, y or both."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=uniform.dtype)
    odd = values[(uniform * 3).long()]
    choose = (uniform > 0.3) | (uniform.flip(-1) <= 0.3)  # at least one of the two
    return torch.where(_every(uniform, 2) & choose, odd, within(uniform, sizes))


def _every(uniform, step):
    index = torch.arange(uniform[..., 0].numel()).view(uniform.shape[:-1])
    return (index % step == 0)[..., None]


def _clear(pixel, sizes):
    """A place in pixels, at least a twentieth of a pixel from the next center, as a location."""
    low = pixel.floor()
    return (low + 0.05 + 0.9 * (pixel - low) + 0.5) / sizes


def locations(draw, shape, points=None, locate=within):
    """Of a shape as in SIZES; `points` as the operation takes them."""
    batch, heads, _, queries, of_level, levels = shape
    counts = [of_level] * len(levels) if points is None else points
    sizes = torch.tensor(levels, dtype=torch.float64).flip(-1).repeat_interleave(torch.tensor(counts), 0)
    uniform = torch.rand(batch, queries, heads, sum(counts), 2, generator=draw.generator, dtype=torch.float64)
    found = locate(uniform, sizes.expand_as(uniform))
    if points is None:
        found = found.unflatten(3, (len(levels), of_level))
    return found.to(draw.device, draw.dtype)


def _apart(tensor):
    """The same values, with x and y far from each other in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
