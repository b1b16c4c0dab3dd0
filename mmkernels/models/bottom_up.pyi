from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..types import Device

class TopDownCaptioner(nn.Module):
    image_dim: int
    hidden: int
    backend: str | None
    embedding: nn.Module
    attention_lstm: nn.Module
    image_projection: nn.Module
    query_projection: nn.Module
    score_projection: nn.Module
    language_lstm: nn.Module
    classifier: nn.Module
    def __init__(
        self,
        vocabulary: int,
        image_dim: int = 2048,
        *,
        embedding: int = 1000,
        hidden: int = 1000,
        attention: int = 512,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, mask: Tensor | None = None, need_weights: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, mask: Tensor | None = None, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, mask: Tensor | None = None, need_weights: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward
    def generate(self, image: Tensor, start: int, length: int, *, mask: Tensor | None = None) -> Tensor: ...
