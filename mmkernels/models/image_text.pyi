from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn

from ..tasks import Task

class ImageTextModel(nn.Module):
    config: dict[str, Any]
    task: Task
    image_encoder: nn.Module
    embedding: nn.Embedding
    lstm: nn.LSTM
    sound_encoder: nn.Module | None
    classifier: nn.Linear
    def __init__(
        self,
        vocabulary: int = 10_000,
        *,
        architecture: Literal["article", "shared", "aligned", "hierarchical"] = "article",
        fusion: Literal["spatial", "channel", "gated", "bidirectional", "additive"] = "spatial",
        task: Literal["binary", "multiclass", "multilabel", "regression"] = "binary",
        outputs: int = 1,
        channels: Sequence[int] | None = None,
        norm: Literal["none", "batch", "group"] = "none",
        embedding: int = 128,
        hidden: int = 128,
        num_heads: int = 1,
        combine: Literal["multiply", "pool"] = "pool",
        align_at: int = -1,
        align_weight: float = 0.5,
        sound: bool = False,
        substitutes: bool | None = None,
        backend: str | None = None,
    ) -> None: ...
    @overload
    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        sound: Tensor | None = None,
        *,
        image_present: Tensor | None = None,
        text_present: Tensor | None = None,
        sound_present: Tensor | None = None,
        target: None = None,
        positive_weight: float | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        sound: Tensor | None = None,
        *,
        image_present: Tensor | None = None,
        text_present: Tensor | None = None,
        sound_present: Tensor | None = None,
        target: Tensor,
        positive_weight: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    __call__ = forward
    def predict(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        sound: Tensor | None = None,
        *,
        image_present: Tensor | None = None,
        text_present: Tensor | None = None,
        sound_present: Tensor | None = None,
    ) -> Tensor: ...
    def attention(
        self,
        image: Tensor,
        text: Tensor | None = None,
        sound: Tensor | None = None,
        *,
        image_present: Tensor | None = None,
        text_present: Tensor | None = None,
        sound_present: Tensor | None = None,
    ) -> Tensor: ...
    def word_attention(
        self,
        image: Tensor,
        text: Tensor,
        sound: Tensor | None = None,
        *,
        image_present: Tensor | None = None,
        text_present: Tensor | None = None,
        sound_present: Tensor | None = None,
    ) -> Tensor: ...
    def encode_text(self, text: Tensor) -> Tensor: ...
