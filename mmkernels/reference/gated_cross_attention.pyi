from typing import Literal, overload

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
