import torch
from torch import Tensor, nn

from ..types import Device

class PixelWordAttention(nn.Module):
    image_dim: int
    text_dim: int
    num_heads: int
    backend: str | None
    image_projection: nn.Module
    query_projection: nn.Module
    key_projection: nn.Module
    value_projection: nn.Module
    out_projection: nn.Module
    result_projection: nn.Module
    query_norm: nn.Module
    out_norm: nn.Module
    activation: nn.Module
    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        num_heads: int = 1,
        *,
        dropout: float = 0.0,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    def forward(self, image: Tensor, text: Tensor, *, mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class LanguageGate(nn.Module):
    gate: nn.Module
    def __init__(self, image_dim: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None: ...
    def forward(self, image: Tensor, fused: Tensor) -> Tensor: ...
    __call__ = forward
