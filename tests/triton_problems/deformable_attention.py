"""Shapes: B, Q, H, d, K, levels. `ordered`: as torch.use_deterministic_algorithms has it."""

import torch

KERNELS = {"sample", "differentiate", "find_cells", "add_cells"}
SHARED_BUDGET = 32 << 10
GROUNDING = ((100, 167), (50, 84), (25, 42), (13, 21))
PROBLEMS = {
    "Grounding DINO's encoder, 22,223 queries, 8 x 32, 16 points, fp32": (
        (1, 22_223, 8, 32, 16, GROUNDING),
        "float32",
        {},
    ),
    "the same in order, masked, bf16": (
        (1, 22_223, 8, 32, 16, GROUNDING),
        "bfloat16",
        {"masked": True, "ordered": True},
    ),
    "300 queries, 8 x 32, 12 points, fp16, locations and weights in fp32": (
        (8, 300, 8, 32, 12, ((80, 80), (40, 40), (20, 20))),
        "float16",
        {"wide": True, "softmax": False, "ordered": True},
    ),
    "70 points, 300 channels, fp32": (
        (2, 97, 3, 300, 70, ((23, 31), (5, 7))),
        "float32",
        {"masked": True, "ordered": True},
    ),
    "1 point, 5 channels, bf16": ((2, 1000, 2, 5, 1, ((23, 31),)), "bfloat16", {}),
}


def launch(module, shape, dtype, masked=False, wide=False, softmax=True, ordered=False):
    B, Q, H, d, K, levels = shape
    dtype = getattr(torch, dtype)
    of_points = torch.float32 if wide else dtype
    S = sum(y * x for y, x in levels)
    points = [K - K // len(levels) * (len(levels) - 1), *[K // len(levels)] * (len(levels) - 1)]
    inputs = (
        torch.empty(B, S, H, d, dtype=dtype),
        torch.empty(B, Q, H, K, 2, dtype=of_points).fill_(-1),
        torch.empty(B, Q, H, K, dtype=of_points),
        torch.empty(B, S, dtype=torch.bool) if masked else None,
    )
    options = [size for level in levels for size in level], points, softmax
    result, rows = module.forward(*inputs, *options)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(ordered)
    try:
        module.backward(result, *inputs, rows, *options, True, True, True)
    finally:
        torch.use_deterministic_algorithms(before)
