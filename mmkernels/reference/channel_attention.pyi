from typing import Literal, overload

from torch import Tensor

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
