from typing import Any, Literal, overload

import torch
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

class AdditiveAttentionFunction(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...
