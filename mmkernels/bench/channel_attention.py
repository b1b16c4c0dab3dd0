"""Channel attention next to the formula as written, the same with a split Linear, torch.compile, and its matrix product
alone."""

import torch
from torch.nn.functional import linear

from .. import functional, peers
from . import report
from .rows import forward, least, memory, step, training, values

# B, N, D, E: a vision transformer's features, a ResNet's, the article's model.
SHAPES = ((32, 196, 768, 768), (8, 576, 1024, 768), (32, 2916, 64, 64))
QUICK = ((8, 196, 256, 256), (32, 2916, 64, 64))
WANTED = ("image", "text", "weight", "bias")


def run(device, *, quick=False, progress):
    """Rows and figures."""
    shapes = QUICK if quick else SHAPES
    options = {"device": device, "rounds": 5 if quick else 10, "budget": 1.0 if quick else 8.0}
    rows = []
    for i, shape in enumerate(shapes):
        progress("x".join(map(str, shape)), i, len(shapes))
        rows += _rows(shape, device, options, quick)
        torch._dynamo.reset()  # the compiled peers of this shape
    progress("done", len(shapes), len(shapes))
    return {"rows": rows, "figures": [figure.as_json() for figure in _figures(rows)]}


def _rows(shape, device, options, quick):
    b, n, d, e = shape
    name = "x".join(map(str, shape))
    draw = torch.Generator().manual_seed(0)
    image, text, weight, bias = (
        torch.randn(size, generator=draw).to(device) for size in ((b, n, d), (b, e), (d, d + e), (d,))
    )
    arguments = dict(zip(WANTED, (image, text, weight * (d + e) ** -0.5, bias)))
    contestants = {
        "ours": functional.channel_attention,
        "eager": peers.channel_attention,
        "split": peers.channel_attention_split,
        "compile": peers.compiled(peers.channel_attention_split),
    }
    own = arguments["weight"][:, :d].contiguous()
    row, times = forward("channel_attention", name, arguments, contestants, options, product=lambda: linear(image, own))
    row["ours / product"] = 1 / times["product"].over(times["ours"])
    yield row
    yield training("channel_attention", name, arguments, contestants, options, wanted=WANTED)
    if quick:
        return
    calls = {n: step(contestants[n], arguments, WANTED) for n in ("ours", "split")}
    yield memory("training's memory beyond result and image gradient, MB", name, calls, 2 * image.nbytes, device)


def _figures(rows):
    products = [
        row["ours / product"] for row in rows if row["kind"].startswith("forward,") and not row["shape"].endswith("x64")
    ]
    yield report.Figure(
        "forward, times its matrix product alone (largest, D >= 256)", 1.10, max(products), at_most=True
    )
    small = values(rows, "forward,", "speed-up", only=lambda row: row["shape"].endswith("x64"))
    yield report.Figure("forward, 64 channels, against the best peer", 1.2, least(small))
    yield report.Figure(
        "forward + backward, against the best peer, mean",
        1.15,
        report.mean(values(rows, "forward + backward,", "speed-up")),
    )
    yield report.Figure(
        "forward + backward, against the best peer, least", 1.0, least(values(rows, "forward + backward,", "speed-up"))
    )
