from typing import Literal, overload

from torch import Tensor

from ..types import Activation, Combine, Offsets

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
    dropout_p: float = 0.0,
    need_weights: Literal[False] = False,
    need_scores: Literal[False] = False,
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
    dropout_p: float = 0.0,
    need_weights: Literal[True],
    need_scores: Literal[False] = False,
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
    dropout_p: float = 0.0,
    need_weights: Literal[False] = False,
    need_scores: Literal[True],
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
    dropout_p: float = 0.0,
    need_weights: Literal[True],
    need_scores: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
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
    dropout_p: float = 0.0,
    need_weights: bool,
    need_scores: Literal[False] = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    dropout_p: float = 0.0,
    need_weights: bool = False,
    need_scores: bool,
) -> Tensor | tuple[Tensor, ...]: ...
