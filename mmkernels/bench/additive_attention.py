"""Additive attention over the patches of a slide, gated: next to eager PyTorch, torch.compile, torchmil, and its matrix
product alone."""

import torch
from torch.nn.functional import linear

from . import report
from .contests import Contest, Memory, contestants, installed, small_calls
from .rows import least, most, values
from .rows import small_calls as small_call_figures

SHAPES = ((1, 10_000, 1024, 256), (1, 100_000, 1024, 256))  # B, N, D, A
QUICK = ((1, 2000, 512, 128),)
BUDGET = 14.0
LARGE = 50_000  # from so many positions on, float64 takes minutes: gradients are checked at the other sizes
OPERATION = "additive_attention"
PARAMETERS = ("w_image", "v", "bias", "w_gate", "bias_gate")


def inputs(shape, device):
    b, n, d, a = shape
    draw = torch.Generator().manual_seed(0)
    layer = lambda *size: (torch.randn(size, generator=draw) * size[-1] ** -0.5).to(device)
    return {
        "image": torch.randn(b, n, d, generator=draw).to(device),
        "query": None,
        "w_image": layer(a, d),
        "w_query": None,
        "v": layer(1, a),
        "bias": layer(a),
        "w_gate": layer(a, d),
        "bias_gate": layer(a),
    }


def _torchmil(arguments):
    """torchmil's module with the operation's arguments; it has parameters of its own."""
    from torchmil.nn import AttentionPool

    class Pool(AttentionPool):
        def forward(self, image, **others):
            return super().forward(image)

    hidden, channels = arguments["w_image"].shape
    return Pool(channels, hidden, gated=True).to(arguments["image"].device)


def _product(arguments):
    both = torch.cat([arguments["w_image"], arguments["w_gate"]])
    return lambda: linear(arguments["image"], both)


def _checked(arguments):
    return [] if arguments["image"].shape[1] > LARGE else [arguments]


NEEDS = {"torchmil": "torchmil"}
PEERS = installed(contestants(OPERATION, "eager", "compile") | {"torchmil": _torchmil}, NEEDS)
PARTS = (
    Contest(
        OPERATION,
        "forward, ms",
        inputs,
        PEERS,
        beside={"product": _product},
        columns=lambda shape, arguments, times: {"ours / product": times["ours"].over(times["product"])},
    ),
    Contest(OPERATION, "forward + backward, ms", inputs, PEERS, wanted=PARAMETERS, checked=_checked),
    Contest(
        OPERATION,
        "forward + backward, the image's gradient too, ms",
        inputs,
        PEERS,
        wanted=("image", *PARAMETERS),
        only=lambda shape: shape[1] <= LARGE,
        quick=False,
    ),
    Memory(
        "training's memory, MB",
        inputs,
        {name: make for name, make in PEERS.items() if name != "compile"},
        PARAMETERS,
        quick=False,
    ),
    *small_calls(OPERATION, inputs, (1, 4, 8, 8), ("image", *PARAMETERS)),
)


def figures(rows):
    products = values(rows, "forward,", "ours / product")
    yield report.Figure("forward, times its matrix product alone (largest)", 1.08, most(products), at_most=True)
    yield report.Figure("forward, against the best peer, least", 1.0, least(values(rows, "forward,", "speed-up")))
    if found := [v for v in values(rows, "forward + backward", "vs torchmil") if v == v]:
        yield report.Figure("forward + backward, against torchmil, least", 1.1, least(found))
    training = values(rows, "forward + backward", "speed-up")
    yield report.Figure("forward + backward, against the best peer, least", 1.0, least(training))
    if found := [mb for mb in values(rows, "training's memory", "ours") if mb is not None]:
        yield report.Figure("training's memory beyond the inputs, MB, most", 103, max(found), at_most=True, unit="MB")
    yield from small_call_figures(rows)
