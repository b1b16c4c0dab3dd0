from torch import Tensor

def absorbed_attention(
    image: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    key_bias: Tensor | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pool: bool = True,
) -> tuple[Tensor | None, Tensor | None]: ...
