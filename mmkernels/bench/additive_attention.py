"""Additive attention over the patches of a slide, gated: next to eager PyTorch, torch.compile, torchmil, and its matrix
product alone."""

import importlib.util

import torch
from torch.nn.functional import linear

from .. import functional, peers
from . import report
from .rows import forward, least, memory, step, training, values

SHAPES = ((1, 10_000, 1024, 256), (1, 100_000, 1024, 256))  # B, N, D, A
QUICK = ((1, 4000, 512, 128),)
PARAMETERS = ("w_image", "v", "bias", "w_gate", "bias_gate")


def run(device, *, quick=False, progress):
    """Rows and figures."""
    shapes = QUICK if quick else SHAPES
    options = {"device": device, "rounds": 5 if quick else 8, "budget": 1.0 if quick else 14.0}
    rows = []
    for i, shape in enumerate(shapes):
        progress("x".join(map(str, shape)), i, len(shapes))
        rows += _rows(shape, device, options, quick)
        torch._dynamo.reset()
    progress("done", len(shapes), len(shapes))
    return {"rows": rows, "figures": [figure.as_json() for figure in _figures(rows)]}


def _torchmil(channels, hidden, device):
    """torchmil's module with the operation's arguments; it has parameters of its own."""
    from torchmil.nn import AttentionPool

    class Pool(AttentionPool):
        def forward(self, image, **others):
            return super().forward(image)

    return Pool(channels, hidden, gated=True).to(device)


def _rows(shape, device, options, quick):
    b, n, d, a = shape
    name = "x".join(map(str, shape))
    draw = torch.Generator().manual_seed(0)
    layer = lambda *size: (torch.randn(size, generator=draw) * size[-1] ** -0.5).to(device)
    image = torch.randn(b, n, d, generator=draw).to(device)
    arguments = {
        "image": image,
        "query": None,
        "w_image": layer(a, d),
        "w_query": None,
        "v": layer(1, a),
        "bias": layer(a),
        "w_gate": layer(a, d),
        "bias_gate": layer(a),
    }
    contestants = {
        "ours": functional.additive_attention,
        "eager": peers.additive_attention,
        "compile": peers.compiled(peers.additive_attention),
    }
    if importlib.util.find_spec("torchmil") is not None:
        contestants["torchmil"] = _torchmil(d, a, device)
    both = torch.cat([arguments["w_image"], arguments["w_gate"]])
    row, times = forward(
        "additive_attention", name, arguments, contestants, options, product=lambda: linear(image, both)
    )
    row["ours / product"] = 1 / times["product"].over(times["ours"])
    yield row
    large = n > 50_000  # checked in float64 at the other sizes
    yield training("additive_attention", name, arguments, contestants, options, wanted=PARAMETERS, check=not large)
    if quick:
        return
    if not large:
        yield training(
            "additive_attention",
            name,
            arguments,
            contestants,
            options,
            wanted=("image", *PARAMETERS),
            kind="forward + backward, the image's gradient too, ms",
        )
    calls = {n: step(f, arguments, PARAMETERS) for n, f in contestants.items() if n != "compile"}
    yield memory("training's memory, MB", name, calls, 0, device)


def _figures(rows):
    products = [row["ours / product"] for row in rows if row["kind"].startswith("forward,")]
    yield report.Figure("forward, times its matrix product alone (largest)", 1.08, max(products), at_most=True)
    yield report.Figure("forward, against the best peer, least", 1.0, least(values(rows, "forward,", "speed-up")))
    if found := [v for v in values(rows, "forward + backward", "vs torchmil") if v == v]:
        yield report.Figure("forward + backward, against torchmil, least", 1.1, least(found))
    yield report.Figure(
        "forward + backward, against the best peer, least", 1.0, least(values(rows, "forward + backward", "speed-up"))
    )
    if found := [
        row["ours"] for row in rows if row["kind"].startswith("training's memory") and row["ours"] is not None
    ]:
        yield report.Figure("training's memory beyond the inputs, MB, most", 40, max(found), at_most=True, unit="MB")
