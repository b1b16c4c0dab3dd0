"""What deformable attention's CUDA kernels move, as the emulator counts it: rows of docs/generated/gpu.md, and
limits."""

import torch

from mmkernels import cases
from mmkernels.cases import deformable_attention as sampled

from . import emulated

PASSES = ("forward", "backward", "backward, deterministic")
# (B, H, d, Q, P, levels, dtype): Grounding DINO's decoder and RT-DETR's, cut down so that the emulator takes seconds;
# channels of no whole pack.
SHAPES = [
    (1, 8, 32, 300, 4, ((25, 42), (13, 21), (7, 11), (4, 6)), torch.float32),
    (1, 8, 32, 300, 4, ((25, 42), (13, 21), (7, 11), (4, 6)), torch.bfloat16),
    (2, 8, 32, 100, 4, ((20, 20), (10, 10), (5, 5)), torch.bfloat16),
    (1, 2, 75, 100, 9, ((9, 7), (4, 4)), torch.float32),
]
# pass, shape, launches, and how often what must move and the rows may. In a fixed order the points of a level are
# read once a band; in 16 bits the sums of value's gradient are written and read in float32.
LIMITS = [
    ("forward", SHAPES[0], 1, 1.0),
    ("forward", SHAPES[1], 1, 1.0),
    ("forward", SHAPES[3], 1, 1.05),
    ("backward", SHAPES[0], 3, 1.05),
    ("backward", SHAPES[1], 4, 1.2),
    ("backward, deterministic", SHAPES[0], 2, 1.2),
    ("backward, deterministic", SHAPES[1], 2, 1.55),
]

SECTION = """## Deformable attention

Least: value, locations, scores, result and sums once; backward the result's gradient and all three gradients, too. Rows
are those at the corners of all points that are inside, four a point at most: read from caches, whose lines neighbouring
queries share. Backward they are read once and added to once, atomically and in float32 (in 16 bits a launch of its own
rounds these sums); or, in a fixed order, the result's gradient is read for each, and every band of positions also reads
all points of its level. The ratio is what was counted to both together. Locations are float32."""
COLUMNS = (
    "B, Q, H, d, P",
    "levels",
    "dtype",
    "pass",
    "least, MB",
    "rows, MB",
    "counted, MB",
    "ratio",
    "launches",
    "blocks",
    "A100, µs",
    "H100, µs",
)
RESOURCES = """Blocks of 256 threads forward and for the sums of value's gradient, else of 128; `packs` load 16 bytes of
channels at once, `singles` one channel. Registers and bytes spilled:"""


def tensors(batch, heads, channels, queries, points, levels, dtype):
    """Value, locations, scores, as the operation takes them: locations are float32."""
    draw = cases.Draw(torch.float32, "cpu", 0)
    given = sampled.arguments(draw, (batch, heads, channels, queries, points, levels), sampled.within)
    return given["value"].to(dtype), given["locations"].flatten(3, 4), given["scores"].flatten(3).to(dtype)


def least(which, *shape):
    """Bytes that must move: value, locations, scores, and result once, 8 bytes a query and head for its softmax;
    backward the result's gradient and all three gradients."""
    value, locations, scores = tensors(*shape)
    rows = scores.shape[0] * scores.shape[1] * scores.shape[2]
    result = rows * value.shape[3] * value.itemsize
    inputs = value.nbytes + locations.nbytes + scores.nbytes
    return (1 if which == "forward" else 2) * inputs + result + 8 * rows


def of_rows(which, *shape):
    """Bytes of the rows at the corners of all points, as far as they are inside, from caches: read once; backward also
    added to once, in float32, or, in a fixed order, the result's gradient read instead."""
    value, locations, _ = tensors(*shape)
    sizes = torch.tensor(shape[5]).flip(-1).repeat_interleave(shape[4], 0)
    low = (locations * sizes - 0.5).floor()
    inside = (low >= 0).int() + (low + 1 < sizes)  # columns, rows
    numbers = int(inside.prod(-1).sum()) * value.shape[3]
    once_more = {"forward": 0, "backward": 4, "backward, deterministic": value.itemsize}
    return numbers * (value.itemsize + once_more[which])


def moved(which, *shape):
    """What the emulator counts for one call, all gradients."""
    value, locations, scores = tensors(*shape)
    levels = shape[5]
    options = sum(levels, ()), (shape[4],) * len(levels), True, which.endswith("deterministic")
    emulated.counts()
    result, rows = torch.ops.mmkernels.deformable_attention_emulated(value, locations, scores, None, *options)
    if which != "forward":
        emulated.counts()
        torch.ops.mmkernels.deformable_attention_emulated_backward(
            torch.ones_like(result), value, locations, scores, None, rows, *options, True, True, True
        )
    return emulated.counts()


def table(peaks):
    """Lines of Markdown. `peaks`: bytes a second of the GPUs that have a column of microseconds."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for shape in SHAPES:
        batch, heads, channels, queries, points, levels, dtype = shape
        sizes = f"{batch}, {queries}, {heads}, {channels}, {points}"
        for which in PASSES:
            found = moved(which, *shape)
            minimum, rows = least(which, *shape), of_rows(which, *shape)
            total = found.loaded + found.stored
            times = " | ".join(f"{1e6 * minimum / peak:.1f}" for peak in peaks)
            lines.append(
                f"| {sizes} | {', '.join(f'{y}x{x}' for y, x in levels)} | {str(dtype).removeprefix('torch.')} | "
                f"{which} | {minimum / 1e6:.2f} | {rows / 1e6:.2f} | {total / 1e6:.2f} | "
                f"{total / (minimum + rows):.2f} | {found.launches} | {found.blocks} | {times} |"
            )
    return lines
