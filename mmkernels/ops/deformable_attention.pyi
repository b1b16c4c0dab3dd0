from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Function

def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    locations: Tensor,
    scores: Tensor,
    *,
    points: Sequence[int] | None = None,
    mask: Tensor | None = None,
    softmax: bool = True,
    backend: str | None = None,
) -> Tensor: ...

class DeformableAttentionFunction(Function): ...
