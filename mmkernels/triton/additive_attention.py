"""Additive attention in Triton: a panel's products come from torch's library, its kernels make hidden vectors of them,
and gradients.

    activate         a panel: u, t -> h, in place; the library multiplies h by v
    normalise        scores -> weights, a program a sample and map: two passes over its scores, which it may give
                     out, too
    pool, merge      weighted sums: a sample is split over programs, their sums are merged in order
    spread           weights times image
    differentiate_weights       backward: the weights' gradient, <grad_result, image> and what arrived
    differentiate_scores        -> the scores' gradient, a program a sample and map
    differentiate    a panel: u, t and h's gradient -> those of u and t in place, and h
    combine          the image's gradient: what comes through the scores, plus the weights times grad_result
Every sum has a fixed order: no atomics. Offsets are looked at by the kernels alone; every access stays within the rows
there are.
"""

import torch
import triton

from ..ops.additive_attention import OPERATION, kept_columns
from ..reference.dropout import scale, threshold
from ..reference.precision import without_autocast
from .additive_backward import combine, differentiate, differentiate_scores, differentiate_weights
from .additive_forward import activate, normalise, pool, spread
from .additive_tiles import Dropout, Image, Panel, ResultGrad, Weights
from .common import define, launch, on_device, processors, require
from .rows import Rows, TextProjection, WeightGradient, nothing_kept, product, sum_columns


class Problem:
    """The arguments of one call, checked."""

    def __init__(self, inputs, activation, pool, dropout_p):
        image, query, w_image, w_query, v, bias, w_gate, bias_gate, mask, offsets, seed = inputs
        if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"image must be float32, bfloat16 or float16, got {image.dtype}")
        if (
            image.dim() != (3 if offsets is None else 2)
            or w_image.dim() != 2
            or v.dim() != 2
            or activation not in (0, 1, 2)
        ):
            raise RuntimeError(
                "image must be [B, N, D], or [rows, D] with offsets; w_image [A, D], v [K, A], activation 0, 1 or 2"
            )
        if offsets is not None:
            require(offsets, "offsets", image, (max(offsets.numel(), 1),), torch.int64)
        self.rows = Rows(image, mask, None if offsets is None else offsets.contiguous())
        batch = self.rows.samples
        channels = image.shape[-1]
        hidden, maps = (w_image.shape[0], v.shape[0])
        if min(channels, hidden, maps) < 1 or (not pool and maps != 1):
            raise RuntimeError("D, A and K must be at least 1, K 1 without pool")
        require(w_image, "w_image", image, (hidden, channels))
        require(v, "v", image, (maps, hidden))
        if bias_gate is not None and w_gate is None:
            raise RuntimeError("bias_gate needs w_gate")
        for t, name, shape, dtype in (
            (w_gate, "w_gate", (hidden, channels), None),
            (bias_gate, "bias_gate", (hidden,), None),
            (mask, "mask", image.shape[:-1], torch.bool),
        ):
            if t is not None:
                require(t, name, image, shape, dtype)
        self.projection = TextProjection(batch, hidden, query, w_query, bias, image, ("query", "w_query"))
        if not 0 <= dropout_p <= 1 or (seed is not None) != (dropout_p > 0):
            raise RuntimeError("dropout_p must be from 0 to 1, with a seed where it isn't 0")
        if seed is not None:
            require(seed, "seed", image, (), torch.int64)
        self.seed = seed
        self.dropout_p = dropout_p
        self.image = image
        self.v = v
        self.w_image = w_image
        self.w_gate = w_gate
        self.pool = pool
        self.activation = activation
        self.batch = batch
        self.channels = channels
        self.hidden = hidden
        self.maps = maps
        self.bias_hidden = self.projection.bias_hidden()
        self.bias_gate = None if bias_gate is None else bias_gate.float().contiguous()
        self.mask = None if mask is None else self.rows.mask.view(torch.uint8)
        self.bounds = self.rows.bounds()
        self.packed = packed = offsets is not None
        self.weights_shape = (maps, self.rows.count) if packed else (batch, maps, image.shape[1])
        self.weights_strides = (0, self.rows.count) if packed else (maps * image.shape[1], image.shape[1])
        self.features = Image(image, *((0, *image.stride()) if packed else image.stride()))
        self.result_shape = (batch, maps, channels) if pool else tuple(image.shape)
        self.block_c = min(64, triton.next_power_of_2(channels))
        tiles = batch * maps * triton.cdiv(channels, self.block_c)
        self.splits = max(1, min(64, 4 * processors(image) // max(tiles, 1), self.rows.count // 256))

    def weights(self, t):
        return Weights(t, *self.weights_strides)

    def result_grad(self, t):
        if t is None:
            return ResultGrad(self.optional(t), 0, 0, 0, 0)
        if self.pool:  # all positions of a sample share a row
            return ResultGrad(t, t.stride(0), t.stride(1), 0, t.stride(2))
        return ResultGrad(t, 0 if self.packed else t.stride(0), 0, *t.stride()[-2:])

    def optional(self, t):
        return self.image if t is None else t  # a pointer that isn't looked at

    def panels(self):
        """(first row, last row + 1, rows, u, t) of every panel. A copy of masked rows and their gradient are as wide as
        image: up to eight times a panel's bytes, since few rows are slow to multiply."""
        for first, last in self.rows.panels(max(self.channels // 8, self.hidden * (1 if self.w_gate is None else 2))):
            x = self.rows.panel(first, last)
            yield first, last, x, product(x, self.w_image), None if self.w_gate is None else product(x, self.w_gate)

    def elementwise(self, kernel, u, t, *others, first, last, **options):
        """Starts activate or differentiate on a panel."""
        units = self.hidden
        block_n, block_c = (16, 64) if units >= 64 else (64, triton.next_power_of_2(units))
        dropout = Dropout(self.image, 0, 1.0, 0)  # not looked at
        if self.seed is not None:
            units = triton.cdiv(self.hidden, 4)
            block_c = min(32, triton.next_power_of_2(units))
            block_n = 512 // block_c
            dropout = Dropout(self.seed, threshold(self.dropout_p), scale(self.dropout_p), first)
        launch(
            kernel,
            (triton.cdiv(last - first, block_n), triton.cdiv(units, block_c)),
            Panel(u, self.optional(t), self.optional(self.bias_hidden), self.optional(self.bias_gate), self.hidden),
            dropout,
            *others,
            self.rows.sample(first, last),
            last - first,
            F=self.activation,
            BIAS_HIDDEN=self.bias_hidden is not None,
            GATED=t is not None,
            BIAS_GATE=self.bias_gate is not None,
            DROPOUT=self.seed is not None,
            **options,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
        )

    def row_grid(self, first, last):
        return triton.cdiv(last - first, 16), triton.cdiv(self.channels, self.block_c)


@without_autocast
def forward(*arguments):
    *inputs, activation, pool_them, dropout_p, need_scores, kept_rows = arguments
    nothing_kept(kept_rows)
    image, _, w_image, _, v, _, w_gate, *_ = inputs
    p = Problem(inputs, activation, pool_them, dropout_p)
    result = image.new_empty(p.result_shape)
    weights = torch.empty(p.weights_shape, dtype=torch.float32, device=image.device)
    given = weights.new_empty(p.weights_shape if need_scores else 0)
    scores = torch.empty((p.rows.count, p.maps), dtype=torch.float32, device=image.device)
    with on_device(image):
        for first, last, _, u, t in p.panels():
            p.elementwise(activate, u, t, first=first, last=last)
            torch.mm(u, v.float().T, out=scores[first:last])
        launch(
            normalise,
            (p.batch, p.maps),
            scores,
            p.weights(weights),
            p.optional(given if need_scores else None),
            p.optional(p.mask),
            p.bounds,
            p.rows.count,
            p.maps,
            PACKED=p.packed,
            MASKED=p.mask is not None,
            GIVE=need_scores,
            BLOCK=1024,
        )
        if pool_them:
            partial = torch.empty((p.batch, p.splits, p.maps, p.channels), dtype=torch.float32, device=image.device)
            launch(
                pool,
                (p.batch * p.splits, triton.cdiv(p.channels, p.block_c), p.maps),
                p.weights(weights),
                p.features,
                p.bounds,
                partial,
                p.rows.count,
                p.maps,
                p.channels,
                p.splits,
                PACKED=p.packed,
                BLOCK_N=32,
                BLOCK_C=p.block_c,
            )
            result.copy_(partial.sum(1) if p.splits > 1 else partial[:, 0])
        else:
            for first, last in p.rows.panels(p.channels):
                launch(
                    spread,
                    p.row_grid(first, last),
                    p.weights(weights),
                    p.features,
                    p.rows.sample(first, last),
                    p.bounds,
                    result,
                    last,
                    p.channels,
                    first,
                    PACKED=p.packed,
                    BLOCK_N=16,
                    BLOCK_C=p.block_c,
                )
    return result, weights, given, weights.new_empty(0, kept_columns(w_image, w_gate))


@without_autocast
def backward(
    grad_result,
    grad_weights,
    grad_scores,
    image,
    query,
    w_image,
    w_query,
    v,
    bias,
    w_gate,
    bias_gate,
    mask,
    offsets,
    seed,
    weights,
    kept,
    activation,
    pool_them,
    dropout_p,
    need_scores,
    kept_rows,
    need_image_grad,
    need_query_grad,
    need_w_image_grad,
    need_w_query_grad,
    need_v_grad,
    need_bias_grad,
    need_w_gate_grad,
    need_bias_gate_grad,
):
    nothing_kept(kept_rows)
    inputs = image, query, w_image, w_query, v, bias, w_gate, bias_gate, mask, offsets, seed
    p = Problem(inputs, activation, pool_them, dropout_p)
    require(weights, "weights", image, p.weights_shape, torch.float32)
    for name, grad, shape, dtype in (
        ("grad_result", grad_result, p.result_shape, None),
        ("grad_weights", grad_weights, p.weights_shape, torch.float32),
        ("grad_scores", grad_scores, p.weights_shape if need_scores else (0,), torch.float32),
    ):
        if grad is not None:
            require(grad, name, image, shape, dtype)
    of_projection = p.projection.needed(need_query_grad, need_w_query_grad, need_bias_grad)
    need_bias_gate_grad = need_bias_gate_grad and bias_gate is not None
    weights = weights.contiguous()
    given = None if grad_weights is None else grad_weights.contiguous()
    given_scores = grad_scores.contiguous() if need_scores and grad_scores is not None else None
    zeros = lambda shape, need: torch.zeros(shape if need else 0, dtype=torch.float32, device=image.device)
    grad_image = image.new_empty(image.shape if need_image_grad else 0)
    grad_w_query = image.new_empty(w_query.shape if of_projection[1] else 0)
    grad_bias_hidden = zeros((p.batch, p.hidden), any(of_projection))
    grad_bias_gate = zeros((1, p.hidden), need_bias_gate_grad)
    grad_v = zeros(v.shape, need_v_grad)
    of_image = WeightGradient(w_image, need_w_image_grad)
    of_gate = WeightGradient(w_image if w_gate is None else w_gate, need_w_gate_grad and w_gate is not None)
    found = torch.empty((p.maps, p.rows.count), dtype=torch.float32, device=image.device)
    up = p.result_grad(grad_result)
    everything = (
        torch.arange(2, device=image.device) * p.rows.count
    )  # made there: nothing waits, and a CUDA graph can have it
    with on_device(image):
        launch(
            differentiate_weights,
            (p.batch * p.splits, p.maps),
            p.weights(weights),
            p.features,
            up,
            p.optional(given),
            p.bounds,
            found,
            p.rows.count,
            p.maps,
            p.channels,
            p.splits,
            PACKED=p.packed,
            GRAD=grad_result is not None,
            GIVEN=given is not None,
            BLOCK_N=32,
            BLOCK_C=p.block_c,
        )
        launch(
            differentiate_scores,
            (p.batch, p.maps),
            p.weights(weights),
            found,
            p.optional(given_scores),
            p.optional(p.mask),
            p.bounds,
            p.rows.count,
            PACKED=p.packed,
            MASKED=p.mask is not None,
            GIVEN=given_scores is not None,
            BLOCK=1024,
        )
        for first, last, x, u, t in p.panels():
            ds = found[:, first:last]
            dh = ds.T @ v.float()
            p.elementwise(differentiate, u, t, dh, first=first, last=last)
            if need_v_grad:
                grad_v.addmm_(ds, dh)
            if any(of_projection):  # before they are rounded for the products: these sums cancel
                sum_columns(grad_bias_hidden, u, p.bounds, first, last)
            if need_bias_gate_grad:
                sum_columns(grad_bias_gate, t, everything, first, last)
            u, t = (None if y is None else y.to(image.dtype) for y in (u, t))
            of_image.add(u, x)
            if t is not None:
                of_gate.add(t, x)
            if need_image_grad:
                through = product(u, w_image.T)
                if t is not None:
                    through += product(t, w_gate.T)
                launch(
                    combine,
                    p.row_grid(first, last),
                    through,
                    p.weights(weights),
                    up,
                    p.optional(p.mask),
                    p.rows.sample(first, last),
                    p.bounds,
                    grad_image,
                    last,
                    p.maps,
                    p.channels,
                    first,
                    PACKED=p.packed,
                    GRAD=grad_result is not None,
                    MASKED=p.mask is not None,
                    BLOCK_N=16,
                    BLOCK_C=p.block_c,
                )
    grad_query, grad_bias = p.projection.gradients(grad_bias_hidden, grad_w_query, of_projection)
    return (
        grad_image,
        grad_query,
        of_image.result(),
        grad_w_query,
        grad_v.to(v.dtype) if need_v_grad else v.new_empty(0),
        grad_bias,
        of_gate.result(),
        grad_bias_gate.view(-1).to(image.dtype),
    )


define(OPERATION.schema.forward("additive_attention_triton"), forward)
define(OPERATION.schema.backward("additive_attention_triton"), backward)
OPERATION.register("additive_attention_triton", "triton")
