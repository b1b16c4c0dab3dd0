from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..types import Combine, Layout, Offsets

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

class SpatialAttentionFunction(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...
