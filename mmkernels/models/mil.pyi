from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from ..modules import AdditiveAttention
from ..types import Device, Offsets

class AttentionMIL(nn.Module):
    attention: AdditiveAttention
    classifier: nn.Module
    def __init__(
        self,
        image_dim: int,
        num_classes: int = 1,
        *,
        hidden_dim: int = 128,
        gated: bool = False,
        dropout: float = 0.0,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def forward(
        self,
        image: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        image: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    __call__ = forward

class ClamOutput(NamedTuple):
    logits: Tensor
    scores: Tensor
    instance_loss: Tensor | None

class ClamSB(nn.Module):
    image_dim: int
    num_classes: int
    num_samples: int
    subtyping: bool
    embedding: nn.Module
    dropout: nn.Module
    attention: AdditiveAttention
    classifier: nn.Module
    instance_classifiers: nn.ModuleList
    def __init__(
        self,
        image_dim: int = 1024,
        num_classes: int = 2,
        *,
        embed_dim: int = 512,
        hidden_dim: int = 256,
        gated: bool = True,
        dropout: float = 0.25,
        num_samples: int = 8,
        subtyping: bool = False,
        backend: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
    def forward(
        self,
        image: Tensor,
        *,
        label: Tensor | None = None,
        mask: Tensor | None = None,
        offsets: Offsets | None = None,
    ) -> ClamOutput: ...
    __call__ = forward
