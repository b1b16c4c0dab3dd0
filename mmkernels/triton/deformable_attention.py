"""Deformable attention in Triton. What is moved, with R = B Q H K 4 d numbers, the rows of the value map around all
points, from the L2 cache where neighbouring queries sample near each other:

    sample           reads locations, scores and R once, writes the result once; scores and locations once more for
                     every other 32 channels
    differentiate    reads locations, scores, the result's gradient and R once, writes the gradients of locations and
                     scores once; adds R to the value's gradient, atomically and in float32, rounded afterwards

Where torch.use_deterministic_algorithms asks for it, nothing is added atomically: points are sorted by the cell of four
positions that they lie in (`find_cells`; 28 bytes a point while it runs), and each position adds up the points of the
four cells around it in that order (`add_cells`: the result's gradient is read where R would be written). One program
goes through all points of its positions: where most queries look at one place, the others wait for it.
"""

import functools
from typing import NamedTuple

import torch
import triton

from ..ops.deformable_attention import OPERATION
from .common import define, launch, on_device, require, tuned
from .deformable_kernels import PointRows, Sampling, add_cells, differentiate, find_cells, sample
from .heads import compiler_options
from .heads_tiles import HeadRows, token_mask


class Configuration(NamedTuple):
    tile: int  # numbers of a tile: queries x points x channels
    warps: int


CONFIGURATIONS = (Configuration(1024, 8), Configuration(512, 4))
ORDERED = Configuration(2048, 4)  # where the value's gradient has a fixed order
CHANNELS = 32  # of a tile, at most
POINTS = 32


def block(size, most):
    return min(triton.next_power_of_2(max(size, 1)), most)


def value_rows(t):
    """[B, S, H, d]"""
    return HeadRows(t, t.stride(0), t.stride(2), t.stride(1), t.stride(3))


def result_rows(t, channels):
    """[B, Q, H d]"""
    return HeadRows(t, t.stride(0), channels * t.stride(2), t.stride(1), t.stride(2))


def point_rows(t):
    return PointRows(t, *t.stride()[:4], t.stride(4) if t.dim() == 5 else 0)


def numbers(rows, device):
    """int32 [rows, ...] on the device, from ints on the host. Nothing is copied from there into a CUDA graph."""
    table = torch.tensor(rows, dtype=torch.int32)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return table.to(device)
    captured = torch.empty(table.shape, dtype=torch.int32, device=device)
    for place, number in zip(captured.flatten(), table.flatten().tolist()):
        place.fill_(number)
    return captured


def make_tables(spatial_shapes, points, device, stream):
    """Where levels lie, as Sampling.points and add_cells take it: of each point, int32 [4, K], and of each level
    [3, L]."""
    widths, heights, positions, cells = [], [], [], []
    position = cell = 0
    for y, x in zip(spatial_shapes[::2], spatial_shapes[1::2]):
        widths.append(x)
        heights.append(y)
        positions.append(position)
        cells.append(cell)
        position += y * x
        cell += (y + 1) * (x + 1)
    of_points = [
        [number for number, count in zip(of_levels, points) for _ in range(count)]
        for of_levels in (widths, heights, positions, cells)
    ]
    return numbers(of_points, device), numbers([widths, positions, cells], device)


kept_tables = functools.lru_cache(256)(make_tables)


def tables(spatial_shapes, points, device):
    """Made once a stream: one that is dropped is still read by what was launched there, and by nothing else. A CUDA
    graph, which may outlive them, has its own."""
    if device.type != "cuda":
        return kept_tables(spatial_shapes, points, device, None)
    make = make_tables if torch.cuda.is_current_stream_capturing() else kept_tables
    return make(spatial_shapes, points, device, torch.cuda.current_stream(device))


class Problem:
    """The arguments of one call, checked."""

    def __init__(self, value, locations, scores, mask, spatial_shapes, points, softmax_rows):
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"value must be float32, bfloat16 or float16, got {value.dtype}")
        if value.dim() != 4 or value.shape[3] < 1:
            raise RuntimeError("value must be [B, S, H, d] with at least one channel")
        if locations.dim() != 5:
            raise RuntimeError("locations must be [B, Q, H, K, 2]")
        B, S, H, d = value.shape
        Q, K = locations.shape[1], locations.shape[3]
        if max(S, Q * H * K) >= 1 << 31:
            raise RuntimeError(f"a sample must have fewer than 2^31 positions and points, got {S} and {Q * H * K}")
        check_levels(spatial_shapes, points, S, K)
        wide = [torch.float32 if t.dtype == torch.float32 else None for t in (locations, scores)]
        require(locations, "locations", value, (B, Q, H, K, 2), wide[0])
        require(scores, "scores", value, (B, Q, H, K), wide[1])
        if mask is not None:
            require(mask, "mask", value, (B, S), torch.bool)
        self.value = value
        self.sizes = B, S, H, d, Q, K
        self.cells = sum((y + 1) * (x + 1) for y, x in zip(spatial_shapes[::2], spatial_shapes[1::2]))
        of_points, self.levels = tables(tuple(spatial_shapes), tuple(points), value.device)
        self.sampling = Sampling(
            S,
            value_rows(value),
            token_mask(mask),
            point_rows(locations),
            point_rows(scores),
            softmax_rows,
            of_points,
            H,
            Q,
            K,
        )
        programs = triton.next_power_of_2(max(B * H * Q, 1))
        self.key = d, K, programs, *wide, mask is None, softmax_rows is None

    def blocks(self, configuration, rows):
        """So many rows, queries or positions, in a tile as leave it its size."""
        d, K = self.sizes[3], self.sizes[5]
        block_k, block_d = block(K, POINTS), block(d, CHANNELS)
        block_n = block(rows, max(configuration.tile // (block_k * block_d), 1))
        return {
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
            "num_warps": configuration.warps,
            **compiler_options(),
        }

    def sample(self, configuration, result):
        B, _, H, d, Q, _ = self.sizes
        blocks = self.blocks(configuration, Q)
        grid = triton.cdiv(Q, blocks["BLOCK_N"]) * B * H, triton.cdiv(d, blocks["BLOCK_D"])
        launch(sample, grid, self.sampling, result_rows(result, d), D=d, **blocks)

    def differentiate(self, configuration, grad, to_locations, to_scores, to_value):
        B, _, H, d, Q, K = self.sizes
        blocks = self.blocks(configuration, Q)
        launch(
            differentiate,
            triton.cdiv(Q, blocks["BLOCK_N"]) * B * H,
            self.sampling,
            result_rows(grad, d),
            None if to_locations is None else point_rows(to_locations),
            None if to_scores is None else point_rows(to_scores),
            None if to_value is None else value_rows(to_value),
            D=d,
            WHOLE=blocks["BLOCK_K"] >= K,
            **blocks,
        )

    def differentiate_value(self, configuration, grad, to_value):
        """In a fixed order."""
        B, S, H, d, Q, K = self.sizes
        nowhere = B * H * self.cells
        dtype = torch.int32 if nowhere < 1 << 31 else torch.int64
        cells = torch.empty(B * Q * H * K, dtype=dtype, device=grad.device)
        blocks = self.blocks(configuration, Q)
        blocks["BLOCK_N"] *= blocks.pop("BLOCK_D")
        launch(
            find_cells,
            triton.cdiv(Q, blocks["BLOCK_N"]) * B * H,
            self.sampling,
            cells,
            self.cells,
            nowhere,
            **blocks,
        )
        cells, order = cells.sort(stable=True)
        begins = torch.searchsorted(cells, torch.arange(nowhere + 1, dtype=dtype, device=grad.device))
        blocks = self.blocks(configuration, S)
        launch(
            add_cells,
            (triton.cdiv(S, blocks["BLOCK_N"]) * B * H, triton.cdiv(d, blocks["BLOCK_D"])),
            self.sampling,
            result_rows(grad, d),
            value_rows(to_value),
            order,
            begins,
            self.levels,
            self.levels.shape[1],
            self.cells,
            D=d,
            **blocks,
        )


def check_levels(spatial_shapes, points, positions, of_points):
    if len(spatial_shapes) != 2 * len(points):
        raise RuntimeError("spatial_shapes must be (Y, X) of each level in turn, and points a count for each")
    levels = [*zip(spatial_shapes[::2], spatial_shapes[1::2])]
    if any(y < 1 or x < 1 for y, x in levels) or sum(y * x for y, x in levels) != positions:
        raise RuntimeError(f"spatial_shapes must be at least 1 and add up to {positions} positions, got {levels}")
    if min(points, default=0) < 0 or sum(points) != of_points:
        raise RuntimeError(f"points must be at least 0 and add up to {of_points}, got {list(points)}")


def forward(value, locations, scores, mask, spatial_shapes, points, softmax, deterministic):
    rows = None
    if softmax and scores.dim() == 4:
        rows = torch.empty((*scores.shape[:3], 2), dtype=torch.float32, device=scores.device)
    problem = Problem(value, locations, scores, mask, spatial_shapes, points, rows)
    B, _, H, d, Q, _ = problem.sizes
    result = value.new_empty(B, Q, H * d)

    def run(configuration):
        problem.sample(configuration, result)

    with on_device(value):
        run(tuned(("deformable forward", *problem.key), CONFIGURATIONS, value, run))
    return result, value.new_empty(0, dtype=torch.float32) if rows is None else rows


def backward(
    grad_result,
    value,
    locations,
    scores,
    mask,
    softmax_rows,
    spatial_shapes,
    points,
    softmax,
    deterministic,
    need_value_grad,
    need_locations_grad,
    need_scores_grad,
):
    rows = softmax_rows.contiguous() if softmax else None
    problem = Problem(value, locations, scores, mask, spatial_shapes, points, rows)
    B, S, H, d, Q, _ = problem.sizes
    if softmax:
        require(softmax_rows, "softmax_rows", value, (B, Q, H, 2), torch.float32)
    if grad_result is None:
        raise RuntimeError("grad_result must be given")
    require(grad_result, "grad_result", value, (B, Q, H * d))
    empty = lambda like, needed: like.new_empty(like.shape if needed else 0)
    grad_value = empty(value, need_value_grad)
    grad_locations = empty(locations, need_locations_grad)
    grad_scores = empty(scores, need_scores_grad)
    at_once = need_value_grad and not deterministic
    sums = grad_value if value.dtype == torch.float32 else grad_value.float() if at_once else None

    def run(configuration):
        if at_once:
            sums.zero_()
        problem.differentiate(
            configuration,
            grad_result,
            grad_locations if need_locations_grad else None,
            grad_scores if need_scores_grad else None,
            sums if at_once else None,
        )

    needs = need_locations_grad, need_scores_grad, at_once
    with on_device(value):
        if any(needs):
            run(tuned(("deformable backward", *needs, *problem.key), CONFIGURATIONS, value, run))
        if need_value_grad and deterministic:
            problem.differentiate_value(ORDERED, grad_result, grad_value)
        elif at_once and sums is not grad_value:
            grad_value.copy_(sums)
    return grad_value, grad_locations, grad_scores


define(OPERATION.schema.forward("deformable_attention_triton"), forward)
define(OPERATION.schema.backward("deformable_attention_triton"), backward)
OPERATION.register("deformable_attention_triton", "triton")
