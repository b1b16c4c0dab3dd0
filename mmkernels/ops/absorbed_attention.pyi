from typing import Any, Literal, overload

import torch
from torch import Tensor

@overload
def absorbed_attention(
    image: Tensor,
    key: Tensor,
    value: None = None,
    *,
    key_bias: Tensor | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pool: Literal[True] = True,
    backend: str | None = None,
) -> tuple[None, Tensor]: ...
@overload
def absorbed_attention(
    image: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pool: Literal[True] = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def absorbed_attention(
    image: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pool: Literal[False],
    backend: str | None = None,
) -> tuple[Tensor, None]: ...

class AbsorbedAttentionFunction(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...
