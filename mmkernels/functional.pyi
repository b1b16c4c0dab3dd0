"""The operations' types. A test compares them with the signatures at runtime."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, overload

from torch import Tensor

__all__ = [
    "additive_attention",
    "bidirectional_attention",
    "channel_attention",
    "gated_cross_attention",
    "spatial_attention",
]

Activation: TypeAlias = Literal["tanh", "relu", "gelu"]
Combine: TypeAlias = Literal["multiply", "pool"]
Layout: TypeAlias = Literal["bnd", "bdhw"]

class Array(Protocol):  # of NumPy, which is no dependency
    def __array__(self, *arguments: Any, **options: Any) -> Any: ...

Offsets: TypeAlias = Tensor | Sequence[int] | Array

@overload
def additive_attention(
    image: Tensor,
    query: Tensor | None,
    w_image: Tensor,
    w_query: Tensor | None,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    w_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
    activation: Activation = "tanh",
    mask: Tensor | None = None,
    offsets: Offsets | None = None,
    combine: Combine = "pool",
    need_weights: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def additive_attention(
    image: Tensor,
    query: Tensor | None,
    w_image: Tensor,
    w_query: Tensor | None,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    w_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
    activation: Activation = "tanh",
    mask: Tensor | None = None,
    offsets: Offsets | None = None,
    combine: Combine = "pool",
    need_weights: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def additive_attention(
    image: Tensor,
    query: Tensor | None,
    w_image: Tensor,
    w_query: Tensor | None,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    w_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
    activation: Activation = "tanh",
    mask: Tensor | None = None,
    offsets: Offsets | None = None,
    combine: Combine = "pool",
    need_weights: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def bidirectional_attention(
    image_query: Tensor,
    text_key: Tensor,
    image_value: Tensor,
    text_value: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def channel_attention(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    need_weights: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def channel_attention(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    need_weights: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def channel_attention(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    need_weights: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def spatial_attention(
    image: Tensor,
    text: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Offsets | None = None,
    scale: float | None = None,
    num_heads: int = 1,
    combine: Combine = "multiply",
    rescale: bool = False,
    layout: Layout = "bnd",
    need_weights: Literal[False] = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def spatial_attention(
    image: Tensor,
    text: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Offsets | None = None,
    scale: float | None = None,
    num_heads: int = 1,
    combine: Combine = "multiply",
    rescale: bool = False,
    layout: Layout = "bnd",
    need_weights: Literal[True],
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def spatial_attention(
    image: Tensor,
    text: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Offsets | None = None,
    scale: float | None = None,
    num_heads: int = 1,
    combine: Combine = "multiply",
    rescale: bool = False,
    layout: Layout = "bnd",
    need_weights: bool,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
