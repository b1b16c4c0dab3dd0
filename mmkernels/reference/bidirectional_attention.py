"""Bidirectional attention, as it is defined."""

import torch

from .gated_cross_attention import safe_softmax
from .precision import without_autocast


@without_autocast
def bidirectional_attention(
    image_query, text_key, image_value, text_value, *, image_mask=None, text_mask=None, scale=None
):
    """See :func:`mmkernels.bidirectional_attention`. Runs in float32 (float64 for float64) inside."""
    dtype = image_query.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    image_query, text_key, image_value, text_value = (
        t.to(accumulate) for t in (image_query, text_key, image_value, text_value)
    )
    scale = image_query.shape[-1] ** -0.5 if scale is None else scale
    # What is masked out still has a row of scores and a result of its own; NaN or Inf there is replaced before it can
    # spread.
    if image_mask is not None:
        part = image_mask[:, None, :, None]
        image_query = image_query.where(part | image_query.isfinite(), 0)
        image_value = image_value.where(part, 0)
    if text_mask is not None:
        part = text_mask[:, None, :, None]
        text_key = text_key.where(part | text_key.isfinite(), 0)
        text_value = text_value.where(part, 0)
    scores = image_query @ text_key.mT * scale
    over_text = scores if text_mask is None else scores.masked_fill(~text_mask[:, None, None], float("-inf"))
    over_image = scores if image_mask is None else scores.masked_fill(~image_mask[:, None, :, None], float("-inf"))
    image_out = safe_softmax(over_text, 3) @ text_value
    text_out = safe_softmax(over_image, 2).mT @ image_value
    return image_out.to(dtype), text_out.to(dtype)
