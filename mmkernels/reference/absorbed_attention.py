"""Absorbed attention, as it is defined."""

import torch

from .gated_cross_attention import safe_softmax
from .precision import without_autocast


@without_autocast
def absorbed_attention(image, key, value=None, *, key_bias=None, image_mask=None, text_mask=None, pool=True):
    """See :func:`mmkernels.absorbed_attention`. Runs in float32 (float64 for float64) inside."""
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    image, key = image.to(accumulate), key.to(accumulate)
    value = None if value is None else value.to(accumulate)
    key_bias = None if key_bias is None else key_bias.to(accumulate)
    # What is masked out still has a row of scores and a result of its own; NaN or Inf there is replaced before it can
    # spread.
    if image_mask is not None:
        image = image.where(image_mask[:, :, None] | image.isfinite(), 0)
    if text_mask is not None:
        part = text_mask[:, None, :, None]
        key = key.where(part | key.isfinite(), 0)
        value = None if value is None else value.where(part, 0)
        key_bias = None if key_bias is None else key_bias.where(part[..., 0] | key_bias.isfinite(), 0)
    scores = image[:, None] @ key.mT
    if key_bias is not None:
        scores = scores + key_bias[:, :, None]
    image_out = text_out = None
    if value is not None:
        over_text = scores if text_mask is None else scores.masked_fill(~text_mask[:, None, None], float("-inf"))
        image_out = (safe_softmax(over_text, 3) @ value).sum(1).to(dtype)
    if pool:
        over_image = scores if image_mask is None else scores.masked_fill(~image_mask[:, None, :, None], float("-inf"))
        text_out = (safe_softmax(over_image, 2).mT @ image[:, None]).to(dtype)
    return image_out, text_out
