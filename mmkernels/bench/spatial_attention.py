"""Spatial attention next to eager PyTorch, torch.compile, and ``copy_``, which moves the bytes that it has to move."""

import math

import torch

from .. import functional
from ..info import last_level_cache
from . import report
from .contests import Contest, Memory, contestants, small_calls
from .rows import against_the_best, least, values
from .rows import small_calls as small_call_figures

# B, N, D.
SHAPES = (
    (32, 2916, 64),
    (32, 196, 768),
    (8, 576, 1024),
    (64, 49, 2048),
    (256, 36, 2048),
    (1, 100_000, 512),
)
QUICK = ((32, 196, 768),)
BUDGET = 6.0
OUTLIER = "256x36x2048"  # has a target of its own
OPERATION = "spatial_attention"
WANTED = ("image", "text")


def inputs(shape, device, dtype=torch.float32):
    b, n, d = shape
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(b, n, d, generator=draw).to(device, dtype)
    return {"image": image, "text": torch.randn(b, d, generator=draw).to(device, dtype)}


def _pooled_inputs(shape, device):
    return {**inputs(shape, device), "combine": "pool"}


def _copy(arguments):
    image = arguments["image"]
    to = torch.empty_like(image)
    return lambda: to.copy_(image)


def _sum(arguments):
    return lambda: arguments["image"].sum()


def _in(change):
    """Ours into a given tensor, after the arguments were changed."""

    def make(arguments):
        changed = change(arguments)
        out = torch.empty_like(changed["image"])
        return lambda: functional.spatial_attention(**changed, out=out)

    return make


def _as_is(arguments):
    return arguments


def _planes(arguments):
    """Channels first, near the square."""
    n = arguments["image"].shape[1]
    height = max(y for y in range(1, math.isqrt(n) + 1) if n % y == 0)
    image = arguments["image"].mT.unflatten(2, (height, -1)).contiguous()
    return {**arguments, "image": image, "layout": "bdhw"}


def _channels_last(arguments):
    planes = _planes(arguments)
    return {**planes, "image": planes["image"].contiguous(memory_format=torch.channels_last)}


def _bfloat16(arguments):
    return {name: value.bfloat16() for name, value in arguments.items()}


def _moved(times, nbytes):
    return {"MB to move": nbytes / 1e6, "GB/s": nbytes / times.median / 1e9}


def _forward_columns(shape, arguments, times):
    """Read once, written once."""
    into = times["ours out="]
    return {
        "out= / copy_": into.over(times["copy_"]),
        "share of copy_": times["copy_"].over(into),
        **_moved(into, 2 * arguments["image"].nbytes),
    }


def _training_columns(shape, arguments, times):
    """Forward: read, write; backward: read image and gradient, write. That is two and a half copies."""
    share = 2.5 * times["copy_"].over(times["ours"])
    return {"share of 2.5 copy_": share, **_moved(times["ours"], 5 * arguments["image"].nbytes)}


def _pool_columns(shape, arguments, times):
    """Reads once and writes next to nothing: half a copy, or a plain sum, whichever is faster, is the limit."""
    ours = times["ours"]
    share = min(times["copy_"].over(ours) / 2, times["sum"].over(ours))
    return {"share of the limit": share, **_moved(ours, arguments["image"].nbytes)}


def _layout_columns(shape, arguments, times):
    return {f"{name} / bnd": times[name].over(times["bnd"]) for name in ("bdhw", "channels_last")}


def _bfloat16_columns(shape, arguments, times):
    image = arguments["image"]
    cache = torch.cuda.get_device_properties(0).L2_cache_size if image.is_cuda else last_level_cache()
    ratio = times["float32"].over(times["bfloat16"])
    return {"larger than cache": image.nbytes > cache, "float32 / bfloat16": ratio}


PEERS = contestants(OPERATION, "eager", "compile")
PARTS = (
    # A fresh result and a given one.
    Contest(
        OPERATION,
        "forward, ms",
        inputs,
        PEERS,
        beside={"copy_": _copy, "ours out=": _in(_as_is)},
        columns=_forward_columns,
    ),
    Contest(
        OPERATION,
        "forward + backward, ms",
        inputs,
        PEERS,
        beside={"copy_": _copy},
        wanted=WANTED,
        columns=_training_columns,
    ),
    Contest(
        OPERATION,
        "pool, ms",
        _pooled_inputs,
        PEERS,
        beside={"copy_": _copy, "sum": _sum},
        columns=_pool_columns,
    ),
    # The same features in three layouts, into a given tensor.
    Contest(
        OPERATION,
        "layouts, ms",
        inputs,
        beside={"bnd": _in(_as_is), "bdhw": _in(_planes), "channels_last": _in(_channels_last)},
        columns=_layout_columns,
        checked=lambda arguments: [_planes(arguments), _channels_last(arguments)],
    ),
    # Half the bytes, into a given tensor.
    Contest(
        OPERATION,
        "bfloat16, ms",
        inputs,
        beside={"float32": _in(_as_is), "bfloat16": _in(_bfloat16)},
        columns=_bfloat16_columns,
        checked=lambda arguments: [_bfloat16(arguments)],
    ),
    Memory(
        "memory of training, MB",
        inputs,
        {name: PEERS[name] for name in ("ours", "eager")},
        WANTED,
        columns=lambda shape, arguments: {"image": arguments["image"].nbytes / 1e6},
    ),
    *small_calls(OPERATION, inputs, (1, 4, 8), WANTED),
)


def figures(rows):
    copies = report.mean(values(rows, "forward,", "out= / copy_"))
    yield report.Figure("forward into out=, against copy_, mean", 1.2, copies, at_most=True)
    yield from against_the_best(rows, "forward", 1.5)
    if outlier := values(rows, "forward,", "speed-up", only=lambda row: row["shape"] == OUTLIER):
        yield report.Figure(f"forward, against the best peer, {OUTLIER}", 2.0, least(outlier))
    yield from against_the_best(rows, "forward + backward", 2.2)
    for layout in ("bdhw", "channels_last"):
        ratio = report.mean(values(rows, "layouts", f"{layout} / bnd"))
        yield report.Figure(f"{layout} against bnd, mean", 1.15, ratio, at_most=True)
    if large := values(rows, "bfloat16", "float32 / bfloat16", only=lambda row: row.get("larger than cache")):
        yield report.Figure("bfloat16 against float32, larger than the cache, mean", 1.5, report.mean(large))
    yield from small_call_figures(rows)
