from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..types import Device

__all__ = ["ChannelAttention"]

class ChannelAttention(nn.Module):
    image_dim: int
    text_dim: int
    backend: str | None
    score_projection: nn.Module
    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        bias: bool = True,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(self, image: Tensor, text: Tensor, *, need_weights: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, image: Tensor, text: Tensor, *, need_weights: Literal[True]) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, image: Tensor, text: Tensor, *, need_weights: bool) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward
