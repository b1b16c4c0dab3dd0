"""Absorbed attention in Triton: heads with keys of their own over the same features. What is moved, with X = bytes of
the image, K of all heads' keys and values:

    text_out         reads X once a block of all heads' tokens, and of the channels that a program holds, from the L2
                     cache but for the first time (heads.py's `attend`, in chunks of positions)
    image_out        reads X once, K once a block of positions; writes the result once, a sum over heads in registers
    backward         reads X, its result's gradient and K once a block of tokens and once a block of positions; writes
                     every gradient once. The means of the weights' gradients, of either softmax, go before

No N x H T matrix, no atomics. Key and value may be float32 beside a 16-bit image: then all is multiplied in float32.
"""

import torch
import triton
import triton.language as tl

from ..ops.absorbed_attention import OPERATION
from ..ops.common import empty_heads, softmax_shape
from .absorbed_kernels import attend_heads, differentiate_image, differentiate_text, mean_gradients, merge_text
from .common import define, launch, on_device, require, tuned
from .heads import BACKWARD_BOTH, FORWARD, MERGE, Configuration, Heads, block, compiler_options
from .heads_tiles import HeadRows, Side, head_rows, token_mask


def as_rows(t):
    """[B, N, C], the same for all heads."""
    return HeadRows(t, t.stride(0), 0, t.stride(1), t.stride(2))


def folded(t):
    """[B, H, T, ...] as [B, 1, H T, ...]: a softmax over positions knows no heads, and all heads' tokens fill a block
    together, where each head's few would leave it empty and read the image for themselves."""
    return None if t is None else t.reshape(t.shape[0], 1, t.shape[1] * t.shape[2], *t.shape[3:])


def folded_mask(mask, heads):
    return None if mask is None else mask.repeat(1, heads)


# Smaller blocks than heads.py has, as there are more sums in a program, and a bias: these spill nowhere.
OWN_FORWARD = {
    torch.float32: (Configuration(32, 16, 32, 64, 4, 1), Configuration(64, 16, 32, 64, 8, 1)),
    torch.bfloat16: (Configuration(64, 32, 64, 64, 4, 2), *FORWARD[torch.bfloat16][1:]),
}
OWN_BACKWARD = {
    torch.float32: (Configuration(16, 16, 32, 32, 4, 1),),
    torch.bfloat16: BACKWARD_BOTH[torch.bfloat16],
}
NARROW = {torch.float32: 32, torch.bfloat16: 64}  # channels of image_out: a head's sums lie beside those of all heads


class Problem:
    """The arguments of one call, checked."""

    def __init__(self, image, key, key_bias, value, image_mask, text_mask, pool):
        if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"image must be float32, bfloat16 or float16, got {image.dtype}")
        if image.dim() != 3 or key.dim() != 4:
            raise RuntimeError("image and key must be [B, N, D] and [B, H, T, D]")
        if value is None and not pool:
            raise RuntimeError("value must be given, or pool be true")
        B, N, D = image.shape
        H, T = key.shape[1:3]
        if D < 1:
            raise RuntimeError("image must have at least one channel")
        wide = key.dtype == torch.float32
        require(key, "key", image, (B, H, T, D), torch.float32 if wide else None)
        if key_bias is not None:
            require(key_bias, "key_bias", image, (B, H, T), torch.float32)
            if text_mask is not None:  # small: cleaned here
                key_bias = key_bias.where(text_mask[:, None] | key_bias.isfinite(), 0)
        self.V = 0
        if value is not None:
            if value.dim() != 4 or value.shape[3] < 1:
                raise RuntimeError("value must be [B, H, T, Dv]")
            self.V = value.shape[3]
            require(value, "value", image, (B, H, T, self.V), key.dtype)
        for mask, name, size in ((image_mask, "image_mask", N), (text_mask, "text_mask", T)):
            if mask is not None:
                require(mask, name, image, (B, size), torch.bool)
        self.sizes = B, H, N, T, D
        of_heads = image[:, None].expand(B, H, N, D)
        self.heads = Heads(of_heads, D, 1.0, both=True)
        if wide and image.dtype != torch.float32:
            self.heads.dots["DOT"] = tl.float32
            self.heads.dtype = torch.float32  # of the configurations
        features = as_rows(image)
        self.image = Side(N, features, features, token_mask(image_mask), None, None, None)
        self.text = Side(T, head_rows(key), head_rows(value), token_mask(text_mask), None, None, None)
        strides = (0, 0, 0) if key_bias is None else key_bias.stride()
        # Seen from a token, and from a position.
        self.bias = None if key_bias is None else HeadRows(key_bias, *strides, 0)
        self.bias_of_image = None if key_bias is None else HeadRows(key_bias, *strides[:2], 0, strides[2])
        self.key = (
            *self.heads.key,
            self.V,
            wide,
            pool,
            triton.next_power_of_2(max(N, 1)),
            triton.next_power_of_2(max(T, 1)),
            *(given is None for given in (key_bias, image_mask, text_mask)),
        )

    def launch(self, kernel, grid, configuration, *arguments, **blocks):
        _, H, _, _, D = self.sizes
        launch(
            kernel,
            grid,
            *arguments,
            **{"D": D, "V": max(self.V, 1), **self.heads.dots, **blocks},
            num_warps=configuration.warps,
            num_stages=configuration.stages,
            **compiler_options(),
        )

    def blocks(self, configuration, rows, cols):
        """Of a kernel whose rows and columns are those sides."""
        D = self.sizes[4]
        return {
            "BLOCK_N": block(rows.size, configuration.rows),
            "BLOCK_T": block(cols.size, configuration.cols),
            "BLOCK_D": block(D, configuration.inner),
        }

    # Forward ---------------------------------------------------------------------------------------------------------

    def attend(self, configuration, image, text, result):
        """Writes image_out and image.softmax."""
        B, H, N, _, _ = self.sizes
        blocks = self.blocks(configuration, image, text)
        block_v = block(self.V, min(configuration.outer, NARROW[self.heads.dtype]))
        grid = triton.cdiv(N, blocks["BLOCK_N"]) * B * triton.cdiv(self.V, block_v)
        self.launch(
            attend_heads, grid, configuration, image, text, self.bias_of_image, result, H, **blocks, BLOCK_V=block_v
        )

    # Backward --------------------------------------------------------------------------------------------------------

    def mean_gradients(self, configuration, rows, cols, bias, channels):
        """rows.delta: the mean of the gradients of a row's weights, with the weights; of values of so many channels."""
        B, H, _, _, D = self.sizes
        blocks = self.blocks(configuration, rows, cols)
        programs = triton.cdiv(rows.size, blocks["BLOCK_N"]) * B * H
        splits, chunk = self.heads.split(programs, cols.size, blocks["BLOCK_T"])
        sums = self.heads.scratch(B, H, splits, rows.size, 2)
        block_v = block(channels, configuration.inner)
        options = {"V": channels, **blocks, "BLOCK_V": block_v}
        self.launch(
            mean_gradients, programs * splits, configuration, rows, cols, bias, sums, H, splits, chunk, **options
        )
        total, weighted = sums.sum(2).unbind(-1)
        return weighted / total.where(total != 0, 1)

    def differentiate_text(self, configuration, text, image, to_key, to_value, to_bias):
        B, H, N, T, D = self.sizes
        blocks = self.blocks(configuration, text, image)
        outer = {"OUT_D": block(D, configuration.outer), "OUT_V": block(self.V, configuration.outer)}
        programs = triton.cdiv(T, blocks["BLOCK_N"]) * B * H
        parts = self.parts(to_key, to_value, outer)
        splits, chunk = self.heads.split(programs * parts, N, blocks["BLOCK_T"])
        partial = [
            self.heads.scratch(B * H * splits * T, width) if splits > 1 and to is not None else None
            for to, width in ((to_key, D), (to_value, self.V), (to_bias, 1))
        ]
        gradients = to_key, to_value, to_bias
        self.launch(
            differentiate_text,
            (programs * splits, parts),
            configuration,
            text,
            image,
            self.bias,
            *gradients,
            *partial,
            H,
            splits,
            chunk,
            **blocks,
            BLOCK_V=block(self.V, configuration.inner),
            **outer,
        )
        if splits == 1:
            return
        outer = {"OUT_D": block(D, 64), "OUT_V": block(self.V, 64)}
        launch(
            merge_text,
            (triton.cdiv(T, MERGE["BLOCK_N"]) * B * H, self.parts(to_key, to_value, outer)),
            text,
            *gradients,
            *partial,
            H,
            splits,
            D=D,
            V=max(self.V, 1),
            **outer,
            **MERGE,
        )

    def parts(self, to_key, to_value, outer):
        D = self.sizes[4]
        of_key = triton.cdiv(D, outer["OUT_D"]) if to_key is not None else 1
        return max(of_key, triton.cdiv(self.V, outer["OUT_V"]) if to_value is not None else 1)

    def differentiate_image(self, configuration, image, text, to_image):
        B, H, N, _, D = self.sizes
        blocks = self.blocks(configuration, image, text)
        out_d = block(D, configuration.outer)
        grid = triton.cdiv(N, blocks["BLOCK_N"]) * B * triton.cdiv(D, out_d)
        block_v = block(self.V, configuration.inner)
        self.launch(
            differentiate_image,
            grid,
            configuration,
            image,
            text,
            self.bias_of_image,
            to_image,
            H,
            **blocks,
            BLOCK_V=block_v,
            OUT_D=out_d,
        )


def forward(image, key, key_bias, value, image_mask, text_mask, pool):
    problem = Problem(image, key, key_bias, value, image_mask, text_mask, pool)
    B, H, N, T, D = problem.sizes
    attended = value is not None

    def empty(wanted, *shape, dtype=None):
        return image.new_empty(shape if wanted else 0, dtype=dtype)

    image_out = empty(attended, B, N, problem.V)
    text_out = empty(pool, B, H, T, D)
    image_softmax = empty(attended, B, H, 2, N, dtype=torch.float32)
    text_softmax = empty(pool, B, 2, H, T, dtype=torch.float32)
    # Backward takes the means again, with weights as it has them; the other backends take them from this.
    unrounded = empty(pool and image.dtype != torch.float32, B, H, T, D, dtype=torch.float32)
    pooled = unrounded if image.dtype != torch.float32 else text_out
    of_image = problem.image._replace(softmax=image_softmax)
    if pool:
        mask = folded_mask(text_mask, H)
        pooling = Problem(image, folded(key), folded(key_bias), None, image_mask, mask, True)
        of_text = pooling.text._replace(softmax=text_softmax)

    def run(configuration):
        if attended:
            problem.attend(configuration, of_image, problem.text, as_rows(image_out))
        if pool:
            to_text = head_rows(folded(pooled))
            pooling.heads.attend(configuration, of_text, pooling.image, to_text, bias=pooling.bias)

    with on_device(key):
        run(tuned(("absorbed forward", *problem.key), OWN_FORWARD[problem.heads.dtype], key, run))
    if pool:
        text_softmax = text_softmax.transpose(1, 2).contiguous()
    if pooled is unrounded:
        text_out.copy_(unrounded)
    return image_out, text_out, image_softmax, text_softmax, unrounded


def backward(
    grad_image_out,
    grad_text_out,
    image,
    key,
    key_bias,
    value,
    image_mask,
    text_mask,
    unrounded,
    image_softmax,
    text_softmax,
    pool,
    need_image_grad,
    need_key_grad,
    need_key_bias_grad,
    need_value_grad,
):
    problem = Problem(image, key, key_bias, value, image_mask, text_mask, pool)
    B, H, N, T, D = problem.sizes
    if value is None:
        grad_image_out = None
    else:
        require(image_softmax, "image_softmax", image, (B, H, 2, N), torch.float32)
        if grad_image_out is not None:
            require(grad_image_out, "grad_image_out", image, (B, N, problem.V))
    if not pool:
        grad_text_out = None
    else:
        require(unrounded, "unrounded", image, (B, H, T, D), torch.float32)
        require(text_softmax, "text_softmax", image, softmax_shape(key), torch.float32)
        if grad_text_out is not None:
            require(grad_text_out, "grad_text_out", image, (B, H, T, D))
    need_bias = need_key_bias_grad and key_bias is not None
    need_value = need_value_grad and value is not None
    # Each gradient that isn't wanted is a tensor of its own: forward mode gives every result its tangent.
    if H > 1 and grad_image_out is None and grad_text_out is not None:
        grad_image, grad_key, _, _ = backward(
            None,
            folded(grad_text_out),
            image,
            folded(key),
            folded(key_bias),
            None,
            image_mask,
            folded_mask(text_mask, H),
            folded(unrounded),
            image.new_empty(0),
            text_softmax.transpose(1, 2).reshape(B, 1, 2, H * T),
            True,
            need_image_grad,
            need_key_grad,
            False,
            False,
        )
        return (
            grad_image,
            empty_heads(key, D).copy_(grad_key.view(key.shape)) if need_key_grad else image.new_empty(0),
            torch.zeros_like(key_bias, memory_format=torch.contiguous_format) if need_bias else image.new_empty(0),
            empty_heads(value, problem.V).zero_() if need_value else image.new_empty(0),
        )
    grad_image = (
        torch.empty((B, N, D), dtype=image.dtype, device=image.device) if need_image_grad else image.new_empty(0)
    )
    grad_key = empty_heads(key, D) if need_key_grad else image.new_empty(0)
    grad_bias = torch.zeros_like(key_bias, memory_format=torch.contiguous_format) if need_bias else image.new_empty(0)
    grad_value = empty_heads(value, problem.V) if need_value else image.new_empty(0)
    to_key = head_rows(grad_key) if need_key_grad else None
    to_value = head_rows(grad_value) if need_value else None
    to_bias = grad_bias if need_bias else None

    def run(configuration):
        of_image, of_text = problem.image, problem.text
        if grad_image_out is not None:
            side = of_image._replace(softmax=image_softmax.contiguous(), grad=as_rows(grad_image_out))
            delta = problem.mean_gradients(configuration, side, of_text, problem.bias_of_image, problem.V)
            of_image = side._replace(delta=delta)
        if grad_text_out is not None:
            side = of_text._replace(softmax=text_softmax.contiguous(), grad=head_rows(grad_text_out))
            of_text = side._replace(delta=problem.mean_gradients(configuration, side, of_image, problem.bias, D))
        if to_key is not None or to_value is not None or to_bias is not None:
            problem.differentiate_text(configuration, of_text, of_image, to_key, to_value, to_bias)
        if need_image_grad:
            problem.differentiate_image(configuration, of_image, of_text, as_rows(grad_image))

    needs = need_image_grad, need_key_grad, need_bias, need_value
    if any(needs):
        with on_device(key):
            run(
                tuned(
                    ("absorbed backward", grad_image_out is None, grad_text_out is None, *needs, *problem.key),
                    OWN_BACKWARD[problem.heads.dtype],
                    key,
                    run,
                )
            )
    return grad_image, grad_key, grad_bias, grad_value


define(OPERATION.schema.forward("absorbed_attention_triton"), forward)
define(OPERATION.schema.backward("absorbed_attention_triton"), backward)
OPERATION.register("absorbed_attention_triton", "triton")
