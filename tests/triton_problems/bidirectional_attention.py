"""Shapes: B, H, N, T, d, dv."""

import torch

from . import heads

KERNELS = heads.KERNELS
SHARED_BUDGET = heads.SHARED_BUDGET
PROBLEMS = {
    "4 heads of 256, 17,821 x 256, bf16": ((1, 4, 17_821, 256, 256, 256), "bfloat16", {"masked": True}),
    "8 heads of 64, 2,916 x 40, fp16": ((8, 8, 2916, 40, 64, 64), "float16", {"masked": True}),
    "4 heads of 256, 17,821 x 256, fp32": ((1, 4, 17_821, 256, 256, 256), "float32", {"masked": True}),
    "1 head of 40 and 24, 100,000 x 77, fp32": ((1, 1, 100_000, 77, 40, 24), "float32", {}),
}


def launch(module, shape, dtype, masked=False):
    B, H, N, T, d, dv = shape
    draw = heads.views(dtype, B, H)
    masks = [torch.empty(B, size, dtype=torch.bool) if masked else None for size in (N, T)]
    inputs = (draw(N, d), draw(T, d), draw(N, dv), draw(T, dv), *masks)
    image_out, text_out, *sums, unrounded = module.forward(*inputs, 1.0)
    exact = text_out if image_out.dtype == torch.float32 else unrounded
    module.backward(image_out, text_out, *inputs, image_out, exact, *sums, 1.0, True, True, True, True)
