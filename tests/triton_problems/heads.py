"""What the operations over heads share."""

import torch

KERNELS = {"attend", "merge_attend", "prepare", "differentiate", "merge_gradients"}
SHARED_BUDGET = 64 << 10  # tiles: all that gfx942 has


def views(dtype, batch, heads):
    """A view of [B, N, H * C], as a projection gives it."""
    return lambda rows, channels: torch.empty(batch, rows, heads, channels, dtype=getattr(torch, dtype)).transpose(1, 2)
