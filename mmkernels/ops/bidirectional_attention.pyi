from typing import Any

import torch
from torch import Tensor

def bidirectional_attention(
    image_query: Tensor,
    text_key: Tensor,
    image_value: Tensor,
    text_value: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...

class BidirectionalAttentionFunction(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...
