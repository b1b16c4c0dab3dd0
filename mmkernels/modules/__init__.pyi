"""The modules' types. Calling a module is calling its ``forward``: nn.Module's own ``__call__`` returns Any."""

from collections.abc import Callable
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from ..functional import Activation, Combine, Layout, Offsets

Device: TypeAlias = torch.device | str | int | None

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

class GatedCrossAttention(nn.Module):
    image_dim: int
    text_dim: int
    embed_dim: int
    value_dim: int
    num_heads: int
    scale: float | None
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

class BidirectionalAttention(nn.Module):
    image_dim: int
    text_dim: int
    embed_dim: int
    num_heads: int
    scale: float | None
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
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    def forward(
        self, image: Tensor, text: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    __call__ = forward

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

class AdditiveAttention(nn.Module):
    image_dim: int
    hidden_dim: int
    query_dim: int | None
    num_queries: int
    activation: Activation
    gated: bool
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
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        query: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward
