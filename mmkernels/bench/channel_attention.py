"""Channel attention next to the formula as written, the same with a split Linear, torch.compile, and its matrix product
alone."""

import torch
from torch.nn.functional import linear

from . import report
from .contests import Contest, Memory, contestants, small_calls
from .rows import least, most, values
from .rows import small_calls as small_call_figures

# B, N, D, E: a vision transformer's features, a ResNet's, the article's model.
SHAPES = ((32, 196, 768, 768), (8, 576, 1024, 768), (32, 2916, 64, 64))
QUICK = ((8, 196, 256, 256),)
BUDGET = 8.0
OPERATION = "channel_attention"
WANTED = ("image", "text", "weight", "bias")


def inputs(shape, device):
    b, n, d, e = shape
    draw = torch.Generator().manual_seed(0)
    image, text, weight, bias = (
        torch.randn(size, generator=draw).to(device) for size in ((b, n, d), (b, e), (d, d + e), (d,))
    )
    return {"image": image, "text": text, "weight": weight * (d + e) ** -0.5, "bias": bias}


def _product(arguments):
    image = arguments["image"]
    own = arguments["weight"][:, : image.shape[-1]].contiguous()
    return lambda: linear(image, own)


PEERS = contestants(OPERATION, "eager", "split", "compile", compiled="_split")
PARTS = (
    Contest(
        OPERATION,
        "forward, ms",
        inputs,
        PEERS,
        beside={"product": _product},
        columns=lambda shape, arguments, times: {"ours / product": times["ours"].over(times["product"])},
    ),
    Contest(OPERATION, "forward + backward, ms", inputs, PEERS, wanted=WANTED),
    Memory(
        "training's memory beyond result and image gradient, MB",
        inputs,
        {name: PEERS[name] for name in ("ours", "split")},
        WANTED,
        known=lambda arguments: 2 * arguments["image"].nbytes,
        quick=False,
    ),
    *small_calls(OPERATION, inputs, (1, 4, 8, 8), WANTED),
)


def figures(rows):
    few = lambda row: row["shape"].endswith("x64")
    products = values(rows, "forward,", "ours / product", only=lambda row: not few(row))
    yield report.Figure("forward, times its matrix product alone (largest, D >= 256)", 1.10, most(products), True)
    if small := values(rows, "forward,", "speed-up", only=few):
        yield report.Figure("forward, 64 channels, against the best peer", 1.2, least(small))
    training = values(rows, "forward + backward,", "speed-up")
    yield report.Figure("forward + backward, against the best peer, mean", 1.15, report.mean(training))
    yield report.Figure("forward + backward, against the best peer, least", 1.0, least(training))
    yield from small_call_figures(rows)
