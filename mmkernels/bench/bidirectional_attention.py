"""Bidirectional attention next to two SDPA calls, the same steps in eager PyTorch, and torch.compile."""

import torch

from . import report
from .contests import Contest, Memory, contestants, shape_name, small_calls
from .rows import least, most, share_of_library, values
from .rows import small_calls as small_call_figures

# B, H, N, T, d (and dv), and how many tokens are real: Grounding DINO's fusion layer, GLIP's, a small one.
SHAPES = ((1, 4, 17_821, 256, 256, 40), (1, 8, 13_294, 256, 256, 256), (8, 8, 1600, 32, 64, 20))
QUICK = ((2, 8, 1600, 32, 64, 20),)
BUDGET = 10.0
OPERATION = "bidirectional_attention"
WANTED = ("image_query", "text_key", "image_value", "text_value")


def inputs(shape, device):
    b, h, n, t, d, real = shape
    draw = torch.Generator().manual_seed(0)
    found = {
        name: torch.randn(b, h, length, d, generator=draw).to(device) for name, length in zip(WANTED, (n, t, n, t))
    }
    if real < t:
        found["text_mask"] = (torch.arange(t, device=device) < real).expand(b, t)
    return found


def _scores(shape, arguments):
    b, h, n, t, _, _ = shape
    return {"scores": b * h * n * t * 4 / 1e6}


PEERS = contestants(OPERATION, "sdpa", "eager", "compile")
PARTS = (
    Contest(
        OPERATION,
        "forward, ms",
        inputs,
        PEERS,
        columns=share_of_library(lambda b, h, n, t, d, real: 2 * b * h * n * d * (2 * t + real)),
    ),
    Contest(
        OPERATION,
        "forward + backward, ms",
        inputs,
        PEERS,
        wanted=WANTED,
        columns=share_of_library(lambda b, h, n, t, d, real: 2 * b * h * n * d * (7 * t + 3 * real)),
    ),
    Memory(
        "memory beyond the results, MB",
        inputs,
        {name: PEERS[name] for name in ("ours", "eager")},
        known=lambda arguments: arguments["image_value"].nbytes + arguments["text_value"].nbytes,
        columns=_scores,
    ),
    *small_calls(OPERATION, inputs, (1, 1, 4, 4, 8, 4), WANTED),
)


def figures(rows):
    """Targets at the large shape; the others are never to be slower."""
    name = shape_name(SHAPES[0])
    large = lambda row: row["shape"] == name
    for kind, target_sdpa, target_eager in (("forward", 2.0, 3.0), ("forward + backward", 1.0, 1.0)):
        if found := values(rows, f"{kind},", "vs sdpa", only=large):
            eager = values(rows, f"{kind},", "vs eager", only=large)
            yield report.Figure(f"{kind}, against two SDPA calls, {name}", target_sdpa, least(found))
            yield report.Figure(f"{kind}, against eager, {name}", target_eager, least(eager))
        yield report.Figure(f"{kind}, against the best peer, least", 1.0, least(values(rows, f"{kind},", "speed-up")))
    shares = [row["ours"] / row["scores"] for row in rows if "scores" in row and large(row) and row["ours"] is not None]
    if shares:
        title = f"memory beyond the results, share of the score matrix, {name}"
        yield report.Figure(title, 0.1, most(shares), at_most=True)
    yield from small_call_figures(rows)
