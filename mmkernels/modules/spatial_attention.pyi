from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..types import Combine, Device, Layout, Offsets

__all__ = ["SpatialAttention"]

class SpatialAttention(nn.Module):
    image_dim: int
    text_dim: int
    num_heads: int
    combine: Combine
    rescale: bool
    layout: Layout
    scale: float | None
    backend: str | None
    text_projection: nn.Module
    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        num_heads: int = 1,
        combine: Combine = "multiply",
        rescale: bool = False,
        layout: Layout = "bnd",
        scale: float | None = None,
        bias: bool = True,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward
