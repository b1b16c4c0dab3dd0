from typing import Literal, overload

from torch import Tensor

from ..functional import Activation, Combine, Layout, Offsets

__all__ = [
    "additive_attention",
    "bidirectional_attention",
    "channel_attention",
    "gated_cross_attention",
    "spatial_attention",
]

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
) -> tuple[Tensor, Tensor]: ...
@overload
def channel_attention(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor | None = None, *, need_weights: Literal[False] = False
) -> Tensor: ...
@overload
def channel_attention(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor | None = None, *, need_weights: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def channel_attention(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor | None = None, *, need_weights: bool
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
) -> Tensor | tuple[Tensor, Tensor]: ...
