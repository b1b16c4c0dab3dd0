from collections.abc import Sequence

from torch import Tensor

def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    locations: Tensor,
    scores: Tensor,
    *,
    points: Sequence[int] | None = None,
    mask: Tensor | None = None,
    softmax: bool = True,
) -> Tensor: ...
