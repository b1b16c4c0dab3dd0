"""Spatial attention next to eager PyTorch, torch.compile, and ``copy_``, which moves the bytes that it has to move."""

import torch

from .. import functional, peers
from ..info import last_level_cache
from . import report
from .rows import against_the_best, compare, least, values, wrong
from .timing import peak_memory, race

# B, N, D, and the image's height and width (N = Y * X).
SHAPES = (
    (32, 2916, 64, 54),
    (32, 196, 768, 14),
    (8, 576, 1024, 24),
    (64, 49, 2048, 7),
    (256, 36, 2048, 6),
    (1, 100_000, 512, 250),
)
QUICK = ((32, 196, 768, 14), (64, 49, 2048, 7))
PEERS = ("eager", "compile")
OUTLIER = "256x36x2048"  # has a target of its own


def run(device, *, quick=False, progress):
    """Rows and figures."""
    shapes = QUICK if quick else SHAPES
    race_options = {"device": device, "rounds": 5 if quick else 15, "budget": 0.8 if quick else 6.0}
    steps = (_forward, _training, _pool, _layouts, _bfloat16, _memory)
    rows = []
    for i, shape in enumerate(shapes):
        for j, step in enumerate(steps):
            progress(f"{_name(shape)} {step.__name__.strip('_')}", i * len(steps) + j, len(shapes) * len(steps))
            rows += step(shape, device, race_options)
        torch._dynamo.reset()  # the compiled peers of this shape
    progress("done", len(shapes) * len(steps), len(shapes) * len(steps))
    return {"rows": rows, "figures": [figure.as_json() for figure in _figures(rows)]}


def _name(shape):
    return "x".join(map(str, shape[:3]))


def _inputs(shape, device, dtype=torch.float32):
    b, n, d, _ = shape
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(b, n, d, generator=generator).to(device, dtype)
    return image, torch.randn(b, d, generator=generator).to(device, dtype)


def _wrong(image, text, gradients=False, **options):
    return wrong("spatial_attention", {"image": image, "text": text, **options}, gradients)


def _forward(shape, device, options):
    """A fresh result and a given one, in milliseconds."""
    image, text = _inputs(shape, device)
    out = torch.empty_like(image)
    compiled = peers.compiled(peers.spatial_attention)
    with torch.inference_mode():
        times = race(
            {
                "copy": lambda: out.copy_(image),
                "out": lambda: functional.spatial_attention(image, text, out=out),
                "fresh": lambda: functional.spatial_attention(image, text),
                "eager": lambda: peers.spatial_attention(image, text),
                "compile": lambda: compiled(image, text),
            },
            **options,
        )
    moved = 2 * image.nbytes  # read once, written once
    row = {
        "kind": "forward, ms",
        "shape": _name(shape),
        "copy_": times["copy"].median * 1e3,
        "ours out=": times["out"].median * 1e3,
        "ours": times["fresh"].median * 1e3,
    }
    row = compare(row, times, "fresh", PEERS, _wrong(image, text))
    if "wrong" not in row:
        row |= {
            "out= / copy_": times["out"].over(times["copy"]),
            "share of copy_": times["copy"].over(times["out"]),
            "MB to move": moved / 1e6,
            "GB/s": moved / times["out"].median / 1e9,
        }
    return [row]


def _training(shape, device, options):
    """Forward and backward with fresh results."""
    image, text = (t.requires_grad_() for t in _inputs(shape, device))
    upstream = torch.randn_like(image)
    compiled = peers.compiled(peers.spatial_attention)
    to = torch.empty_like(image)
    source = image.detach()

    def step(function):
        return lambda: torch.autograd.grad(function(image, text), (image, text), upstream)

    times = race(
        {
            "copy": lambda: to.copy_(source),
            "ours": step(functional.spatial_attention),
            "eager": step(peers.spatial_attention),
            "compile": step(compiled),
        },
        **options,
    )
    moved = 5 * image.nbytes  # forward: read, write; backward: read image and gradient, write
    row = {
        "kind": "forward + backward, ms",
        "shape": _name(shape),
        "2.5 copy_": times["copy"].median * 2.5e3,
        "ours": times["ours"].median * 1e3,
    }
    row = compare(row, times, "ours", PEERS, _wrong(image.detach(), text.detach(), gradients=True))
    if "wrong" not in row:
        row |= {
            "share of copy_": 2.5 * times["copy"].over(times["ours"]),
            "MB to move": moved / 1e6,
            "GB/s": moved / times["ours"].median / 1e9,
        }
    return [row]


def _pool(shape, device, options):
    """Reads once and writes next to nothing: half a copy, or a plain sum, whichever is faster, is the limit."""
    image, text = _inputs(shape, device)
    to = torch.empty_like(image)
    compiled = peers.compiled(peers.spatial_attention)
    with torch.inference_mode():
        times = race(
            {
                "copy": lambda: to.copy_(image),
                "sum": lambda: image.sum(),
                "ours": lambda: functional.spatial_attention(image, text, combine="pool"),
                "eager": lambda: peers.spatial_attention(image, text, combine="pool"),
                "compile": lambda: compiled(image, text, combine="pool"),
            },
            **options,
        )
    row = {
        "kind": "pool, ms",
        "shape": _name(shape),
        "copy_ / 2": times["copy"].median * 500,
        "sum": times["sum"].median * 1e3,
        "ours": times["ours"].median * 1e3,
    }
    row = compare(row, times, "ours", PEERS, _wrong(image, text, combine="pool"))
    if "wrong" not in row:
        row |= {
            "share of the limit": min(times["copy"].over(times["ours"]) / 2, times["sum"].over(times["ours"])),
            "MB to move": image.nbytes / 1e6,
            "GB/s": image.nbytes / times["ours"].median / 1e9,
        }
    return [row]


def _layouts(shape, device, options):
    """The same features in three layouts, into a given tensor."""
    image, text = _inputs(shape, device)
    height = shape[3]
    planes = image.mT.unflatten(2, (height, -1)).contiguous()
    last = planes.contiguous(memory_format=torch.channels_last)
    outs = [torch.empty_like(t) for t in (image, planes, last)]
    with torch.inference_mode():
        times = race(
            {
                "bnd": lambda: functional.spatial_attention(image, text, out=outs[0]),
                "bdhw": lambda: functional.spatial_attention(planes, text, layout="bdhw", out=outs[1]),
                "last": lambda: functional.spatial_attention(last, text, layout="bdhw", out=outs[2]),
            },
            **options,
        )
    row = {
        "kind": "layouts, ms",
        "shape": _name(shape),
        "bnd": times["bnd"].median * 1e3,
        "bdhw": times["bdhw"].median * 1e3,
        "channels_last": times["last"].median * 1e3,
    }
    problems = _wrong(planes, text, layout="bdhw") + _wrong(last, text, layout="bdhw")
    return [
        row
        | (
            {"wrong": problems}
            if problems
            else {
                "bdhw / bnd": times["bdhw"].over(times["bnd"]),
                "channels_last / bnd": times["last"].over(times["bnd"]),
            }
        )
    ]


def _bfloat16(shape, device, options):
    """Half the bytes, into a given tensor."""
    wide = _inputs(shape, device)
    narrow = _inputs(shape, device, torch.bfloat16)
    outs = torch.empty_like(wide[0]), torch.empty_like(narrow[0])
    with torch.inference_mode():
        times = race(
            {
                "float32": lambda: functional.spatial_attention(*wide, out=outs[0]),
                "bfloat16": lambda: functional.spatial_attention(*narrow, out=outs[1]),
            },
            **options,
        )
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else last_level_cache()
    row = {
        "kind": "bfloat16, ms",
        "shape": _name(shape),
        "float32": times["float32"].median * 1e3,
        "bfloat16": times["bfloat16"].median * 1e3,
        "larger than cache": wide[0].nbytes > cache,
    }
    problems = _wrong(*narrow)
    return [
        row | ({"wrong": problems} if problems else {"float32 / bfloat16": times["float32"].over(times["bfloat16"])})
    ]


def _memory(shape, device, options):
    """What one training step needs beyond its inputs, in MB."""
    image, text = (t.requires_grad_() for t in _inputs(shape, device))
    upstream = torch.randn_like(image)
    row = {"kind": "memory of training, MB", "shape": _name(shape), "image": image.nbytes / 1e6}
    for name, function in (("ours", functional.spatial_attention), ("eager", peers.spatial_attention)):
        peak = peak_memory(lambda: torch.autograd.grad(function(image, text), (image, text), upstream), device)
        row[name] = None if peak is None else peak / 1e6
    return [row]


def _figures(rows):
    yield report.Figure(
        "forward into out=, against copy_, mean",
        1.2,
        report.mean(values(rows, "forward,", "out= / copy_")),
        at_most=True,
    )
    yield from against_the_best(rows, "forward", 1.5)
    outlier = values(rows, "forward,", "speed-up", only=lambda row: row["shape"] == OUTLIER)
    if outlier:
        yield report.Figure(f"forward, against the best peer, {OUTLIER}", 2.0, least(outlier))
    yield from against_the_best(rows, "forward + backward", 2.2)
    for layout in ("bdhw", "channels_last"):
        yield report.Figure(
            f"{layout} against bnd, mean", 1.15, report.mean(values(rows, "layouts", f"{layout} / bnd")), at_most=True
        )
    large = values(rows, "bfloat16", "float32 / bfloat16", only=lambda row: row["larger than cache"])
    if large:
        yield report.Figure("bfloat16 against float32, larger than the cache, mean", 1.5, report.mean(large))
