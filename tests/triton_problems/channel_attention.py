"""Shapes: image's. Few rows: the libraries' products run."""

import torch

KERNELS = {"weigh", "differentiate", "add_columns"}
SHARED_BUDGET = 32 << 10
PROBLEMS = {
    "196 x 768, bf16": ((2, 196, 768), "bfloat16", {}),
    "49 x 64, fp32, weights": ((2, 49, 64), "float32", {"need_weights": True}),
    "49 x 5,000, fp16": ((1, 49, 5000), "float16", {}),
}


def launch(module, shape, dtype, need_weights=False):
    image = torch.zeros(shape, dtype=getattr(torch, dtype))
    batch, _, channels = shape
    text = 64
    inputs = (
        image,
        image.new_zeros(batch, text),
        image.new_zeros(channels, channels + text),
        image.new_zeros(channels),
    )
    result, weights, kept = module.forward(*inputs, need_weights, 0)
    module.backward(result, weights if need_weights else None, *inputs, kept, need_weights, 0, True, True, True, True)
