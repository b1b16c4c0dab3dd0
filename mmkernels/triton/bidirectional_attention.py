"""Bidirectional attention in Triton: two softmaxes of one score matrix.

The kernels are in heads_forward.py and heads_backward.py.

Forward: positions attend to tokens, and tokens, in chunks of positions, to positions: where the text is longer than a
tile, the sums of one side alone fill a program's registers. Backward: positions as rows, then tokens as rows; a tile's
scores feed both softmaxes, and the gradients of one side's queries and values leave together.
"""

import torch
import triton

from ..ops.bidirectional_attention import OPERATION
from ..ops.common import empty_heads, empty_softmax, softmax_shape
from .common import define, on_device, require, tuned
from .heads import BACKWARD_BOTH, FORWARD, Heads
from .heads_tiles import Side, head_rows, token_mask


class Problem:
    """The arguments of one call, checked."""

    def __init__(self, image_query, text_key, image_value, text_value, image_mask, text_mask, scale):
        if image_query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"image_query must be float32, bfloat16 or float16, got {image_query.dtype}")
        if image_query.dim() != 4 or text_key.dim() != 4 or image_value.dim() != 4:
            raise RuntimeError(
                "image_query, text_key and image_value must be [B, H, N, d], [B, H, T, d] and [B, H, N, dv]"
            )
        B, H, N, d = image_query.shape
        T, dv = text_key.shape[2], image_value.shape[3]
        if d < 1 or dv < 1:
            raise RuntimeError("image_query and image_value must have at least one channel")
        self.image_shape = (B, H, N, dv)
        self.text_shape = (B, H, T, dv)
        require(text_key, "text_key", image_query, (B, H, T, d))
        require(image_value, "image_value", image_query, self.image_shape)
        require(text_value, "text_value", image_query, self.text_shape)
        for mask, name, size in ((image_mask, "image_mask", N), (text_mask, "text_mask", T)):
            if mask is not None:
                require(mask, name, image_query, (B, size), torch.bool)
        self.heads = Heads(image_query, dv, float(scale), both=True)
        self.image = Side(N, head_rows(image_query), head_rows(image_value), token_mask(image_mask), None, None, None)
        self.text = Side(T, head_rows(text_key), head_rows(text_value), token_mask(text_mask), None, None, None)
        self.key = (
            *self.heads.key,
            triton.next_power_of_2(max(N, 1)),
            triton.next_power_of_2(max(T, 1)),
            image_mask is None,
            text_mask is None,
        )


def forward(image_query, text_key, image_value, text_value, image_mask, text_mask, scale):
    problem = Problem(image_query, text_key, image_value, text_value, image_mask, text_mask, scale)
    image_out, text_out = (empty_heads(t, problem.image_shape[3]) for t in (image_query, text_key))
    image_softmax, text_softmax = (empty_softmax(t) for t in (image_query, text_key))
    rounds = image_query.dtype != torch.float32
    unrounded = image_query.new_empty(problem.text_shape if rounds else 0, dtype=torch.float32)
    to_unrounded = head_rows(unrounded) if rounds else None
    image = problem.image._replace(softmax=image_softmax)
    text = problem.text._replace(softmax=text_softmax)

    def run(configuration):
        problem.heads.attend(configuration, image, text, head_rows(image_out))
        problem.heads.attend(configuration, text, image, head_rows(text_out), attended=to_unrounded)

    with on_device(image_query):
        run(tuned(("bidirectional forward", *problem.key), FORWARD[problem.heads.dtype], image_query, run))
    return image_out, text_out, image_softmax, text_softmax, unrounded


def backward(
    grad_image_out,
    grad_text_out,
    image_query,
    text_key,
    image_value,
    text_value,
    image_mask,
    text_mask,
    image_out,
    unrounded,
    image_softmax,
    text_softmax,
    scale,
    need_image_query_grad,
    need_text_key_grad,
    need_image_value_grad,
    need_text_value_grad,
):
    problem = Problem(image_query, text_key, image_value, text_value, image_mask, text_mask, scale)
    for t, name, shape in (
        (grad_image_out, "grad_image_out", problem.image_shape),
        (grad_text_out, "grad_text_out", problem.text_shape),
        (image_out, "image_out", problem.image_shape),
    ):
        if t is not None:
            require(t, name, image_query, shape)
    require(unrounded, "unrounded", image_query, problem.text_shape, torch.float32)
    for t, name, like in ((image_softmax, "image_softmax", image_query), (text_softmax, "text_softmax", text_key)):
        require(t, name, image_query, softmax_shape(like), torch.float32)
    needs = need_image_query_grad, need_text_key_grad, need_image_value_grad, need_text_value_grad
    grads = [
        empty_heads(t, t.shape[3]) if need else image_query.new_empty(0)
        for t, need in zip((image_query, text_key, image_value, text_value), needs)
    ]
    if not any(needs):
        return tuple(grads)
    to_image_query, to_text_key, to_image_value, to_text_value = (
        head_rows(t) if need else None for t, need in zip(grads, needs)
    )
    heads = problem.heads

    def side(side, grad, out, softmax):
        """With what its own softmax gives, if that has a gradient."""
        if grad is None:
            return side
        side = side._replace(softmax=softmax.contiguous(), grad=head_rows(grad), delta=heads.scratch(*grad.shape[:3]))
        heads.prepare(side, side.grad, head_rows(out))
        return side

    def run(configuration):
        image = side(problem.image, grad_image_out, image_out, image_softmax)
        text = side(problem.text, grad_text_out, unrounded, text_softmax)
        heads.differentiate(configuration, image, text, to_image_query, to_image_value)
        heads.differentiate(configuration, text, image, to_text_key, to_text_value)

    with on_device(image_query):
        run(
            tuned(
                ("bidirectional backward", grad_image_out is None, grad_text_out is None, *needs, *problem.key),
                BACKWARD_BOTH[problem.heads.dtype],
                image_query,
                run,
            )
        )
    return tuple(grads)


define(OPERATION.schema.forward("bidirectional_attention_triton"), forward)
define(OPERATION.schema.backward("bidirectional_attention_triton"), backward)
OPERATION.register("bidirectional_attention_triton", "triton")
