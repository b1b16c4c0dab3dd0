from typing import Literal, overload

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
