import torch
from torch import Tensor, nn

from ..types import Device

__all__ = ["AttentionPooling"]

class AttentionPooling(nn.Module):
    image_dim: int
    num_heads: int
    num_queries: int
    query_dim: int | None
    out_dim: int
    embed_dim: int
    scale: float | None
    absorb: bool | None
    backend: str | None
    query: nn.Parameter | None
    query_projection: nn.Module
    key_projection: nn.Module
    value_projection: nn.Module
    out_projection: nn.Module
    def __init__(
        self,
        image_dim: int,
        num_heads: int,
        num_queries: int = 1,
        query_dim: int | None = None,
        out_dim: int | None = None,
        *,
        embed_dim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        absorb: bool | None = None,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    def reset_parameters(self) -> None: ...
    def forward(self, image: Tensor, query: Tensor | None = None, *, image_mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward
