"""Shapes: image's. Options: its own, and `bags` for packed ones."""

import torch

KERNELS = {
    "forward_whole",
    "forward_chunks",
    "forward_merge",
    "forward_apply",
    "backward_whole",
    "backward_chunks",
    "backward_merge",
    "backward_apply",
}
SHARED_BUDGET = 32 << 10
PROBLEMS = {
    "one sample of 100,000 x 512, bf16": ((1, 100_000, 512), "bfloat16", {"masked": True}),
    "12 heads of 196 x 64, fp32": ((32, 196, 768), "float32", {"num_heads": 12}),
    "bags, 1024 channels, bf16, pool": ((100_000, 1024), "bfloat16", {"bags": 8, "pool": True, "masked": True}),
    "bdhw 64 x 54 x 54, fp32": ((32, 64, 54, 54), "float32", {}),
    "bdhw 2048 x 7 x 7, fp16, pool": ((64, 2048, 7, 7), "float16", {"pool": True}),
}


def launch(module, shape, dtype, masked=False, bags=None, num_heads=1, pool=False):
    image = torch.empty(shape, dtype=getattr(torch, dtype))
    batch = bags or shape[0]
    channels = shape[2] if len(shape) == 3 else shape[1]
    text = image.new_empty(batch, channels)
    grid = shape[:1] if bags else (shape[0], *shape[2:]) if len(shape) == 4 else shape[:2]
    mask = torch.empty(grid, dtype=torch.bool) if masked else None
    offsets = torch.empty(bags + 1, dtype=torch.int64) if bags else None
    options = (mask, offsets, 1.0, num_heads, pool, False)
    result, weights = module.forward(image, text, *options)
    module.backward(result, weights, image, text, *options[:2], weights, *options[2:], True, True)
