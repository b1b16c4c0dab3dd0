from typing import Any, Literal, overload

import torch
from torch import Tensor

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

class ChannelAttentionFunction(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...
