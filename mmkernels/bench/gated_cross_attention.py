"""Gated cross-attention next to SDPA with a multiplication, eager PyTorch, torch.compile, and the rate of torch.mm."""

import torch

from . import report
from .contests import Contest, Memory, contestants, small_calls
from .rows import against_the_best, least, share_of_library, values
from .rows import small_calls as small_call_figures

# B, H, N, T, d (and dv): detection, segmentation, classification features against short texts.
SHAPES = (
    (8, 12, 576, 77, 64),
    (4, 8, 1600, 20, 64),
    (32, 12, 196, 32, 64),
    (1, 4, 22_000, 256, 256),
    (8, 8, 4096, 77, 40),
    (64, 1, 49, 16, 512),
)
QUICK = ((2, 12, 576, 77, 64),)
BUDGET = 6.0
LONG_TEXT = 77  # from so many tokens on, a share of torch.mm's rate is a target
LONG_IMAGE = (1, 1, 100_000, 77, 64)
OPERATION = "gated_cross_attention"
WANTED = ("query", "key", "value", "gate")


def inputs(shape, device):
    b, h, n, t, d = shape
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(b, h, length, d, generator=draw).to(device) for name, length in zip(WANTED, (n, t, t, n))}


def _products(count):
    """Columns of a contest that consists of so many products of the scores' size."""
    rate = share_of_library(lambda b, h, n, t, d: 2 * count * b * h * n * t * d)
    return lambda shape, arguments, times: {"T": shape[3], **rate(shape, arguments, times)}


PEERS = contestants(OPERATION, "sdpa", "eager", "compile")
PARTS = (
    Contest(OPERATION, "forward, ms", inputs, PEERS, columns=_products(2)),
    # Forward two products, backward five.
    Contest(OPERATION, "forward + backward, ms", inputs, PEERS, wanted=WANTED, columns=_products(7)),
    Memory(
        "memory beyond the result, MB",
        inputs,
        {name: PEERS[name] for name in ("ours", "eager")},
        known=lambda arguments: arguments["gate"].nbytes,
        columns=lambda shape, arguments: {
            "image": arguments["query"].nbytes / 1e6,
            "scores": shape[0] * shape[1] * shape[2] * shape[3] * 4 / 1e6,
        },
        shapes=(LONG_IMAGE,),
        quick=False,
    ),
    *small_calls(OPERATION, inputs, (1, 1, 4, 4, 8), WANTED),
)


def figures(rows):
    yield from against_the_best(rows, "forward", 2.0)
    shares = values(rows, "forward,", "share of torch.mm", only=lambda row: row.get("T", LONG_TEXT) >= LONG_TEXT)
    yield report.Figure(f"forward, share of torch.mm's rate where T >= {LONG_TEXT}, least", 0.7, least(shares))
    yield from against_the_best(rows, "forward + backward", 1.8)
    yield from small_call_figures(rows)
