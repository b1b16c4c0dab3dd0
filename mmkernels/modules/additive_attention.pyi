from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..types import Activation, Combine, Device, Offsets

__all__ = ["AdditiveAttention"]

class AdditiveAttention(nn.Module):
    image_dim: int
    hidden_dim: int
    query_dim: int | None
    num_queries: int
    activation: Activation
    gated: bool
    dropout: float
    combine: Combine
    backend: str | None
    image_projection: nn.Module
    query_projection: nn.Module | None
    gate_projection: nn.Module | None
    score_projection: nn.Module
    def __init__(
        self,
        image_dim: int,
        hidden_dim: int,
        query_dim: int | None = None,
        num_queries: int = 1,
        activation: Activation = "tanh",
        gated: bool = False,
        dropout: float = 0.0,
        *,
        combine: Combine = "pool",
        bias: bool = True,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[False] = False,
        need_scores: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[True],
        need_scores: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[False] = False,
        need_scores: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[True],
        need_scores: Literal[True],
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: bool,
        need_scores: Literal[False] = False,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: bool = False,
        need_scores: bool,
    ) -> Tensor | tuple[Tensor, ...]: ...
    __call__ = forward
