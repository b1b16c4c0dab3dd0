from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor, nn

from ..modules import SpatialAttention
from ..tasks import Task
from .bottom_up import TopDownCaptioner
from .lavt import LanguageGate, PixelWordAttention
from .mil import AttentionMIL, ClamOutput, ClamSB
from .san import StackedAttentionNetwork

__all__ = [
    "AttentionMIL",
    "ClamOutput",
    "ClamSB",
    "ImageTextModel",
    "LanguageGate",
    "PixelWordAttention",
    "StackedAttentionNetwork",
    "TopDownCaptioner",
]

class ImageTextModel(nn.Module):
    image_encoder: nn.Module
    embedding: nn.Embedding
    lstm: nn.LSTM
    fusion: SpatialAttention
    classifier: nn.Linear
    def __init__(
        self,
        vocabulary: int = 10_000,
        *,
        channels: Sequence[int] = (32, 64),
        embedding: int = 128,
        hidden: int = 128,
        num_heads: int = 1,
        combine: Literal["multiply", "pool"] = "pool",
        backend: str | None = None,
    ) -> None: ...
    task: Task
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, target: None = None, positive_weight: float | None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self, image: Tensor, text: Tensor, *, target: Tensor, positive_weight: float | None = None
    ) -> tuple[Tensor, Tensor]: ...
    __call__ = forward
    def predict(self, image: Tensor, text: Tensor) -> Tensor: ...
    def attention(self, image: Tensor, text: Tensor) -> Tensor: ...
    def encode_text(self, text: Tensor) -> Tensor: ...
