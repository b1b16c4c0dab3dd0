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
