"""Gated cross-attention next to SDPA with a multiplication, eager PyTorch, torch.compile, compiled FlexAttention, and
the rate of torch.mm.

FlexAttention takes part for the sake of GPUs: on the CPU it has no backward pass, and takes 1.2 to 5 times as long as
SDPA.
"""

import torch

from .. import peers
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
# B, H, N, T, d, dv: the query of a pooling head, of a classifier, a decoder's 20, Perceiver's latents; a whole image.
UNGATED = (
    (1, 16, 1, 729, 72, 72),
    (8, 12, 1, 197, 64, 64),
    (1, 12, 20, 577, 64, 64),
    (1, 1, 512, 50_176, 261, 1024),
    (1, 4, 22_000, 256, 256, 256),
)
BUDGET = 6.0
LONG_TEXT = 77  # from so many tokens on, a share of torch.mm's rate is a target
LONG_IMAGE = (1, 1, 100_000, 77, 64)
OPERATION = "gated_cross_attention"
WANTED = ("query", "key", "value", "gate")


def inputs(shape, device):
    b, h, n, t, d = shape
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(b, h, length, d, generator=draw).to(device) for name, length in zip(WANTED, (n, t, t, n))}


def _ungated_inputs(shape, device):
    b, h, n, t, d, dv = shape
    draw = torch.Generator().manual_seed(0)
    sizes = {"query": (n, d), "key": (t, d), "value": (t, dv)}
    return {name: torch.randn(b, h, *size, generator=draw).to(device) for name, size in sizes.items()}


def _products(narrow, wide):
    """Columns of a contest that consists of so many products of the scores' size over d and over dv channels."""
    rate = share_of_library(lambda b, h, n, t, d, dv=None: 2 * b * h * n * t * (narrow * d + wide * (dv or d)))
    return lambda shape, arguments, times: {"T": shape[3], **rate(shape, arguments, times)}


def _compiled_flex(arguments):
    """The multiplication can't be compiled with it: on the CPU that knows nothing which follows."""
    attend = peers.compiled(peers.gated_cross_attention_flex)

    def flex(query, key, value, gate=None):
        result = attend(query, key, value)
        return result if gate is None else gate * result

    return flex


FLEX = "compiled flex"
TRAINED = contestants(OPERATION, "sdpa", "eager", "compile")
PEERS = TRAINED | {FLEX: _compiled_flex}
FORWARD = {"contestants": PEERS, "columns": _products(1, 1), "slow": (FLEX,)}
# The scores are computed again; then two products give gradients of value and weights, two those of query and key.
TRAINING = {"contestants": TRAINED, "columns": _products(4, 3)}
PARTS = (
    Contest(OPERATION, "forward, ms", inputs, **FORWARD),
    Contest(OPERATION, "forward + backward, ms", inputs, wanted=WANTED, **TRAINING),
    Contest(OPERATION, "without a gate, forward, ms", _ungated_inputs, shapes=UNGATED, quick=False, **FORWARD),
    Contest(
        OPERATION,
        "without a gate, forward + backward, ms",
        _ungated_inputs,
        wanted=WANTED[:3],
        shapes=UNGATED,
        quick=False,
        **TRAINING,
    ),
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
    for kind in ("without a gate, forward", "without a gate, forward + backward"):
        if found := values(rows, f"{kind},", "speed-up"):
            yield report.Figure(f"{kind}, against the best peer, least", 1.0, least(found))
    yield from small_call_figures(rows)
