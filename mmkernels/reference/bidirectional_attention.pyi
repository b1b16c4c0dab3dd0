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
) -> tuple[Tensor, Tensor]: ...
