import torch
from torch import Tensor, nn

from ..types import Device

__all__ = ["BidirectionalAttention"]

class BidirectionalAttention(nn.Module):
    image_dim: int
    text_dim: int
    embed_dim: int
    num_heads: int
    scale: float | None
    absorb: bool | None
    backend: str | None
    image_query_projection: nn.Module
    text_key_projection: nn.Module
    image_value_projection: nn.Module
    text_value_projection: nn.Module
    image_out_projection: nn.Module
    text_out_projection: nn.Module
    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        scale: float | None = None,
        absorb: bool | None = None,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    def forward(
        self, image: Tensor, text: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    __call__ = forward
