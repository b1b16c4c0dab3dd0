from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..types import Device

__all__ = ["DeformableAttention"]

class DeformableAttention(nn.Module):
    embed_dim: int
    num_heads: int
    num_levels: int
    num_points: tuple[int, ...]
    backend: str | None
    offset_projection: nn.Module
    score_projection: nn.Module
    value_projection: nn.Module
    out_projection: nn.Module
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int | Sequence[int],
        *,
        bias: bool = True,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    def reset_parameters(self) -> None: ...
    def forward(
        self,
        query: Tensor,
        image: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]] | Tensor,
        *,
        query_position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor: ...
    __call__ = forward
