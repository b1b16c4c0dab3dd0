from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..types import Device

__all__ = ["GatedCrossAttention"]

class GatedCrossAttention(nn.Module):
    image_dim: int
    text_dim: int
    embed_dim: int
    value_dim: int
    num_heads: int
    scale: float | None
    absorb: bool | None
    backend: str | None
    query_projection: nn.Module
    gate_projection: nn.Module
    key_projection: nn.Module
    value_projection: nn.Module
    out_projection: nn.Module
    gate_activation: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None
    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        num_heads: int = 1,
        *,
        embed_dim: int | None = None,
        value_dim: int | None = None,
        gate_activation: Callable[[Tensor], Tensor] | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
        scale: float | None = None,
        absorb: bool | None = None,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, mask: Tensor | None = None, need_weights: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, mask: Tensor | None = None, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, mask: Tensor | None = None, need_weights: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward
