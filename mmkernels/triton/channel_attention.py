"""Channel attention in Triton: a panel's scores come from torch's library, its kernels turn them into the result or
their gradient.

A program holds some rows of a panel and walks their channels. Forward it reads scores and image and writes the result:
whole rows once where they fit a program, else scores twice. Backward it also reads the results' gradients, and writes
the scores' over the scores.
"""

import torch
import triton
import triton.language as tl

from ..ops.channel_attention import OPERATION
from ..reference.precision import without_autocast
from .common import all_have_read, define, launch, on_device, require
from .rows import Rows, TextProjection, WeightGradient, blocks, nothing_kept, product, sum_columns


@triton.jit
def load_scores(scores, bias_hidden, r, sample, c, inside, C):
    """scores [rows, C] plus the bias of each row's sample; -Inf where there is nothing."""
    x = tl.load(scores + r[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_hidden + sample[:, None].to(tl.int64) * C + c[None, :], mask=inside, other=0.0)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def statistics(scores, bias_hidden, r, sample, rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Every row's largest score and the sum of exponentials."""
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = load_scores(scores, bias_hidden, r, sample, c, (r < rows)[:, None] & (c < C)[None, :], C)
        now = tl.maximum(m, tl.max(x, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(m - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        m = now
    return tl.where(m == float("-inf"), 0.0, m), tl.where(r < rows, total, 1.0)


@triton.jit
def weigh(
    scores,
    bias_hidden,
    sample,
    image,
    image_n,
    image_c,
    result,
    weights,
    rows,
    C,
    WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A panel: result = image * softmax(scores + bias_hidden)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(sample + r, mask=r < rows, other=0)
    m, total = statistics(scores, bias_hidden, r, b, rows, C, BLOCK_N, BLOCK_C)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        p = tl.exp(load_scores(scores, bias_hidden, r, b, c, inside, C) - m[:, None]) / total[:, None]
        x = tl.load(image + r[:, None] * image_n + c[None, :].to(tl.int64) * image_c, mask=inside, other=0.0).to(
            tl.float32
        )
        at = r[:, None] * C + c[None, :]
        tl.store(result + at, (p * x).to(result.dtype.element_ty), mask=inside)
        if WEIGHTS:
            tl.store(weights + at, p.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def arriving(x, grad_result, grad_weights, at, inside, RESULT: tl.constexpr, WEIGHTS: tl.constexpr):
    """(the weights' gradient, the result's) of the image at `x`; both gradients at `at`."""
    dp = tl.zeros(inside.shape, tl.float32)
    g = tl.zeros(inside.shape, tl.float32)
    if RESULT:
        g = tl.load(grad_result + at, mask=inside, other=0.0).to(tl.float32)
        dp = g * tl.load(x, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTS:
        dp += tl.load(grad_weights + at, mask=inside, other=0.0).to(tl.float32)
    return dp, g


@triton.jit
def differentiate(
    scores,
    bias_hidden,
    sample,
    image,
    image_n,
    image_c,
    grad_result,
    grad_weights,
    direct,
    rows,
    C,
    RESULT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A panel: scores -> their gradient, in place; direct = grad_result * weights, what reaches the image without
    them."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(sample + r, mask=r < rows, other=0)
    m, total = statistics(scores, bias_hidden, r, b, rows, C, BLOCK_N, BLOCK_C)
    mean = tl.zeros([BLOCK_N], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        p = tl.exp(load_scores(scores, bias_hidden, r, b, c, inside, C) - m[:, None]) / total[:, None]
        at = r[:, None] * C + c[None, :]
        x = image + r[:, None] * image_n + c[None, :].to(tl.int64) * image_c
        dp, _ = arriving(x, grad_result, grad_weights, at, inside, RESULT, WEIGHTS)
        mean += tl.sum(p * dp, 1)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        p = tl.exp(load_scores(scores, bias_hidden, r, b, c, inside, C) - m[:, None]) / total[:, None]
        at = r[:, None] * C + c[None, :]
        x = image + r[:, None] * image_n + c[None, :].to(tl.int64) * image_c
        dp, g = arriving(x, grad_result, grad_weights, at, inside, RESULT, WEIGHTS)
        all_have_read()
        tl.store(scores + at, p * (dp - mean[:, None]), mask=inside)
        if DIRECT:
            tl.store(direct + at, (p * g).to(direct.dtype.element_ty), mask=inside)


def check(image, text, weight):
    if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"image must be float32, bfloat16 or float16, got {image.dtype}")
    if image.dim() != 3 or image.shape[2] < 1:
        raise RuntimeError("image must be [B, N, D] with at least one channel")
    channels = image.shape[2]
    require(weight, "weight", image, (channels, channels + text.shape[-1]))


def projection_of(image, text, weight, bias):
    samples, _, channels = image.shape
    return TextProjection(samples, channels, text, weight[:, channels:], bias, image, ("text", "weight"))


@without_autocast
def forward(image, text, weight, bias, need_weights, kept_rows):
    nothing_kept(kept_rows)
    check(image, text, weight)
    result = image.new_empty(image.shape)
    weights = image.new_empty(image.shape if need_weights else 0)
    rows = Rows(image)
    channels = image.shape[2]
    bias_hidden = projection_of(image, text, weight, bias).bias_hidden()
    layer = weight[:, :channels]
    to = result.view(-1, channels)
    of = weights.view(-1, channels) if need_weights else result.view(-1, channels)
    block_n, block_c, warps = blocks(channels)
    with on_device(image):
        for first, last in rows.panels(channels):
            x = rows.panel(first, last)
            launch(
                weigh,
                triton.cdiv(last - first, block_n),
                product(x, layer),
                bias_hidden,
                rows.sample(first, last),
                x,
                *x.stride(),
                to[first:last],
                of[first:last],
                last - first,
                channels,
                WEIGHTS=need_weights,
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                num_warps=warps,
            )
    return result, weights, bias_hidden.new_empty(0, channels)


@without_autocast
def backward(
    grad_result,
    grad_weights,
    image,
    text,
    weight,
    bias,
    kept,
    need_weights,
    kept_rows,
    need_image_grad,
    need_text_grad,
    need_weight_grad,
    need_bias_grad,
):
    nothing_kept(kept_rows)
    check(image, text, weight)
    grad_weights = grad_weights if need_weights else None
    for name, grad in (("grad_result", grad_result), ("grad_weights", grad_weights)):
        if grad is not None:
            require(grad, name, image, image.shape)
    rows = Rows(image)
    channels = image.shape[2]
    projection = projection_of(image, text, weight, bias)
    bias_hidden = projection.bias_hidden()
    layer = weight[:, :channels]
    of_projection = projection.needed(need_text_grad, need_weight_grad, need_bias_grad)
    ups = [None if grad is None else Rows(grad) for grad in (grad_result, grad_weights)]
    grad_image = image.new_empty(image.shape if need_image_grad else 0)
    grad_bias_hidden = torch.zeros(
        bias_hidden.shape if any(of_projection) else 0, dtype=torch.float32, device=image.device
    )
    of_layer = WeightGradient(layer, need_weight_grad)
    bounds = rows.bounds()
    block_n, block_c, warps = blocks(channels, 1024)
    with on_device(image):
        for first, last in rows.panels(channels):
            x = rows.panel(first, last)
            scores = product(x, layer)
            direct = torch.empty(
                (last - first, channels) if need_image_grad else (1, 1), dtype=torch.float32, device=image.device
            )
            # Copied where they lie otherwise: sum() sends one number back, expanded. None: a pointer that isn't looked
            # at.
            up = [x if up is None else up.panel(first, last).contiguous() for up in ups]
            launch(
                differentiate,
                triton.cdiv(last - first, block_n),
                scores,
                bias_hidden,
                rows.sample(first, last),
                x,
                *x.stride(),
                *up,
                direct,
                last - first,
                channels,
                RESULT=grad_result is not None,
                WEIGHTS=grad_weights is not None,
                DIRECT=need_image_grad,
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                num_warps=warps,
            )
            if any(of_projection):  # before they are rounded for the products: this sum cancels
                sum_columns(grad_bias_hidden, scores, bounds, first, last)
            scores = scores.to(image.dtype)
            of_layer.add(scores, x)
            if need_image_grad:
                torch.add(direct, product(scores, layer.T), out=grad_image.view(-1, channels)[first:last])
    grad_weight = weight.new_empty(weight.shape if need_weight_grad else 0)
    if need_weight_grad:
        grad_weight[:, :channels] = of_layer.result()
    grad_text, grad_bias = projection.gradients(grad_bias_hidden, grad_weight[..., channels:], of_projection)
    return grad_image, grad_text, grad_weight, grad_bias


define(OPERATION.schema.forward("channel_attention_triton"), forward)
define(OPERATION.schema.backward("channel_attention_triton"), backward)
OPERATION.register("channel_attention_triton", "triton")
