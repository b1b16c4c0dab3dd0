"""Shapes: B, Q, H, d, points of each level; levels."""

import torch

KERNELS = {"sample", "differentiate", "find_cells", "add_cells"}
SHARED_BUDGET = 64 << 10  # tiles: all that gfx942 has
DINO = ((100, 167), (50, 84), (25, 42), (13, 21))
PROBLEMS = {
    "Grounding DINO's encoder, bf16": ((1, 22_223, 8, 32, (4, 4, 4, 4)), "bfloat16", {"levels": DINO, "wide": True}),
    "its decoder, fp32, masked": ((1, 900, 8, 32, (4, 4, 4, 4)), "float32", {"levels": DINO, "masked": True}),
    "different points, 300 channels, fp16": ((2, 50, 1, 300, (9, 3)), "float16", {"levels": ((9, 7), (4, 4))}),
    "40 points, weights given, fp32": ((2, 70, 3, 20, (40,)), "float32", {"levels": ((20, 30),), "softmax": False}),
}


def launch(module, shape, dtype, levels, masked=False, wide=False, softmax=True):
    B, Q, H, d, points = shape
    dtype = getattr(torch, dtype)
    S, K = sum(y * x for y, x in levels), sum(points)
    of_points = torch.float32 if wide else dtype
    inputs = (
        torch.empty(B, S, H, d, dtype=dtype),
        torch.empty(B, Q, H, K, 2, dtype=of_points),
        torch.empty(B, Q, H, K, dtype=of_points),
        torch.empty(B, S, dtype=torch.bool) if masked else None,
    )
    sizes = sum(levels, ())
    result, rows = module.forward(*inputs, sizes, points, softmax, False)
    for deterministic in (False, True):
        module.backward(result, *inputs, rows, sizes, points, softmax, deterministic, True, True, True)
