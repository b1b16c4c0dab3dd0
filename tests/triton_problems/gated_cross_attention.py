"""Shapes: B, H, N, T, d, dv."""

import torch

from . import heads

KERNELS = heads.KERNELS
SHARED_BUDGET = heads.SHARED_BUDGET
PROBLEMS = {
    "8 x 12 heads of 64, 576 x 77, bf16": ((8, 12, 576, 77, 64, 64), "bfloat16", {"mask": "tokens"}),
    "4 heads of 256, 22,000 x 256, fp16": ((1, 4, 22_000, 256, 256, 256), "float16", {"gated": False}),
    "1 head of 40, 4,096 x 77, bf16, bias": ((1, 1, 4096, 77, 40, 40), "bfloat16", {"mask": "bias"}),
    "8 heads of 64, 1,600 x 20, fp32": ((4, 8, 1600, 20, 64, 64), "float32", {"mask": "tokens"}),
    "1 head of 512, 49 x 5,000, fp32, pairs": ((1, 1, 49, 5000, 512, 512), "float32", {"mask": "pairs"}),
}


def launch(module, shape, dtype, mask=None, gated=True):
    B, H, N, T, d, dv = shape
    draw = heads.views(dtype, B, H)
    tokens = torch.empty(B, 1, T, dtype=torch.bool).expand(B, H, T) if mask in ("tokens", "pairs") else None
    pairs = torch.empty(1, 1, N, T, dtype=torch.bool).expand(B, H, N, T) if mask == "pairs" else None
    bias = torch.empty(1, H, N, T).expand(B, H, N, T) if mask == "bias" else None
    inputs = (draw(N, d), draw(T, d), draw(T, dv), draw(N, dv) if gated else None, tokens, pairs, bias)
    result, _, log_sum = module.forward(*inputs, 1.0, True)
    module.backward(result, *inputs, result, log_sum, 1.0, True, True, True, True, True, True)
