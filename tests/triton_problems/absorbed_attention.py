"""Shapes: B, H, N, T, D, Dv; Dv 0: no image_out."""

import torch

KERNELS = {
    "attend",
    "attend_heads",
    "differentiate_image",
    "differentiate_text",
    "mean_gradients",
    "merge_attend",
    "merge_text",
}
SHARED_BUDGET = 64 << 10  # tiles: all that gfx942 has
PROBLEMS = {
    "4 heads, 17,821 x 256, 16 tokens, bf16": ((1, 4, 17_821, 16, 256, 256), "bfloat16", {"masked": True}),
    "16 heads, 8 x 729 x 1152, 1 query, fp16": ((8, 16, 729, 1, 1152, 0), "float16", {}),
    "4 heads, 17,821 x 256, 256 tokens, fp32": ((1, 4, 17_821, 256, 256, 256), "float32", {"masked": True}),
    "4 heads, 2,916 x 40, 77 tokens, bf16, text in fp32": ((2, 4, 2916, 77, 40, 24), "bfloat16", {"wide": True}),
}


def launch(module, shape, dtype, masked=False, wide=False):
    B, H, N, T, D, Dv = shape
    dtype = getattr(torch, dtype)
    of_text = torch.float32 if wide else dtype
    masks = [torch.empty(B, size, dtype=torch.bool) if masked else None for size in (N, T)]
    inputs = (
        torch.empty(B, N, D, dtype=dtype),
        torch.empty(B, H, T, D, dtype=of_text),
        torch.empty(B, H, T) if Dv else None,
        torch.empty(B, H, T, Dv, dtype=of_text) if Dv else None,
        *masks,
        True,
    )
    image_out, text_out, *sums, unrounded = module.forward(*inputs)
    *tensors, pool = inputs
    exact = text_out if dtype == torch.float32 else unrounded
    module.backward(image_out if Dv else None, text_out, *tensors, exact, *sums, pool, True, True, True, True)
