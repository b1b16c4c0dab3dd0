from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..types import Device

class StackedAttentionNetwork(nn.Module):
    image_dim: int
    query_dim: int
    image_projection: nn.Module
    layers: nn.ModuleList
    classifier: nn.Module
    def __init__(
        self,
        image_dim: int,
        query_dim: int,
        num_answers: int,
        *,
        hidden_dim: int = 512,
        num_layers: int = 2,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(
        self, image: Tensor, query: Tensor, *, mask: Tensor | None = None, need_weights: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, image: Tensor, query: Tensor, *, mask: Tensor | None = None, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, image: Tensor, query: Tensor, *, mask: Tensor | None = None, need_weights: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward
