"""Deformable attention next to what public models run without a GPU: Hugging Face's function as installed, eager and
compiled, and the same in our own plain PyTorch."""

import torch

from .. import functional, peers
from . import report
from .contests import Contest, Memory, contestants, installed, shape_name, small_calls
from .rows import least, most, values
from .rows import small_calls as small_call_figures
from .timing import race

# Levels (Y, X) by name, so that a row's name stays short.
LEVELS = {
    "GroundingDINO": ((100, 167), (50, 84), (25, 42), (13, 21)),
    "RTDETR": ((80, 80), (40, 40), (20, 20)),
    "Mask2Former": ((64, 64), (32, 32), (16, 16)),
    "one": ((8, 8),),
}
# B, Q, H, d, P, levels: Grounding DINO's encoder and decoder, RT-DETR's decoder, Mask2Former's pixel decoder, a small
# one.
SHAPES = (
    (1, 22_223, 8, 32, 4, "GroundingDINO"),
    (1, 900, 8, 32, 4, "GroundingDINO"),
    (8, 300, 8, 32, 4, "RTDETR"),
    (2, 5376, 8, 32, 4, "Mask2Former"),
    (1, 10, 8, 32, 4, "one"),
)
QUICK = ((1, 300, 8, 32, 4, "Mask2Former"),)
BUDGET = 8.0
OPERATION = "deformable_attention"
WANTED = ("value", "locations", "scores")


def inputs(shape, device, dtype=torch.float32):
    """An encoder's queries are the positions, and look around themselves; a decoder's are anywhere."""
    b, q, h, d, p, name = shape
    levels = LEVELS[name]
    draw = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=draw)
    positions = sum(y * x for y, x in levels)
    if q == positions:
        centers = torch.cat([_centers(y, x) for y, x in levels])[None, :, None, None, None].expand(b, -1, 1, 1, 1, 2)
    else:
        centers = torch.rand(b, q, 1, 1, 1, 2, generator=draw)
    sizes = torch.tensor(levels).flip(-1)[:, None]
    locations = centers + 2 * normal(b, q, h, len(levels), p, 2) / sizes
    return {
        "value": normal(b, positions, h, d).to(device, dtype),
        "spatial_shapes": levels,
        "locations": locations.to(device),
        "scores": normal(b, q, h, len(levels), p).to(device),
    }


def _centers(y, x):
    rows, columns = torch.meshgrid((torch.arange(y) + 0.5) / y, (torch.arange(x) + 0.5) / x, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


def _hugging_face(compiled):
    def make(arguments):
        from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

        layer = MultiScaleDeformableAttention()

        def hugging_face(value, spatial_shapes, locations, scores):
            weights = scores.flatten(3).softmax(-1).view(scores.shape)
            return layer.forward(value, None, spatial_shapes, None, locations, weights, 64)

        return peers.compiled(hugging_face) if compiled else hugging_face

    return make


NEEDS = {"hugging face": "transformers", "compile": "transformers"}
PEERS = installed(
    contestants(OPERATION, "eager") | {"hugging face": _hugging_face(False), "compile": _hugging_face(True)}, NEEDS
)


def _share(reads):
    """Columns: bytes of rows through the caches a second, `reads` times each point's four, next to plain gathering of
    rows as long in places as near, on as many threads."""

    def columns(shape, arguments, times):
        b, q, h, d, p, name = shape
        rows = 4 * b * q * h * p * len(LEVELS[name])
        rate = reads * rows * d * arguments["value"].element_size() / times["ours"].median / 1e9
        return {"GB/s": rate, "share of gathering": rate / _gathering(arguments["value"], rows)}

    return columns


def _gathering(value, rows):
    """GB/s of ``index_select`` on as many rows, neighbours one after the other."""
    table = value[0].reshape(-1, value.shape[3])
    index = torch.arange(rows, device=value.device) // 2 % table.shape[0]
    seconds = race({"gather": lambda: table.index_select(0, index)}, device=value.device.type, rounds=5, budget=1)
    return rows * value.shape[3] * value.element_size() / seconds["gather"].median / 1e9


def _bfloat16(shape, device):
    return inputs(shape, device, torch.bfloat16)


def _stacked(arguments):
    """Bytes of the samples, stacked."""
    b, _, _, d = arguments["value"].shape
    return arguments["scores"].numel() * d * 4


def _in_float32(arguments):
    wide = arguments | {"value": arguments["value"].float()}
    return lambda: functional.deformable_attention(**wide)


PARTS = (
    Contest(OPERATION, "forward, ms", inputs, PEERS, columns=_share(1)),
    Contest(OPERATION, "forward + backward, ms", inputs, PEERS, wanted=WANTED, columns=_share(4)),
    Contest(
        OPERATION,
        "forward, value in bfloat16, ms",
        _bfloat16,
        {"ours": PEERS["ours"]},
        beside={"float32": _in_float32},
    ),
    Memory(
        "memory beyond the result, MB",
        inputs,
        {name: PEERS[name] for name in PEERS if name != "compile"},
        known=lambda arguments: arguments["scores"][..., 0, 0].numel() * arguments["value"].shape[3] * 4,
        columns=lambda shape, arguments: {"stacked samples": _stacked(arguments) / 1e6},
    ),
    *small_calls(OPERATION, inputs, (1, 4, 2, 8, 2, "one"), WANTED),
)


def figures(rows):
    """Targets by shape: against the best peer, forward and training."""
    titles = (
        "Grounding DINO's encoder",
        "its decoder",
        "RT-DETR's decoder",
        "Mask2Former's pixel decoder",
        "a small one",
    )
    targets = ((22, 10), (8, 8), (8, 8), (12, 10), (1, 1))
    for shape, title, wanted in zip(SHAPES, titles, targets):
        name = shape_name(shape)
        of_shape = lambda row, name=name: row["shape"] == name
        for kind, target in zip(("forward, ms", "forward + backward, ms"), wanted):
            if found := values(rows, kind, "speed-up", only=of_shape):
                yield report.Figure(f"{kind.removesuffix(', ms')}, {title}", target, least(found))
    narrow = [row["ours"] / row["float32"] for row in rows if "bfloat16" in row["kind"] and "wrong" not in row]
    if narrow:
        yield report.Figure("forward in bfloat16 over float32, time", 1, most(narrow), at_most=True)
    memory = [
        100 * row["ours"] / row["stacked samples"]
        for row in rows
        if "memory" in row["kind"] and row["ours"] is not None
    ]
    if memory:
        yield report.Figure(
            "memory beyond the result, of the stacked samples", 1, most(memory), at_most=True, unit=" %"
        )
    yield from small_call_figures(rows)
