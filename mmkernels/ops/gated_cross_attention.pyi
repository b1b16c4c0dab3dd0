from typing import Any, Literal, overload

import torch
from torch import Tensor

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

class GatedCrossAttentionFunction(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...
