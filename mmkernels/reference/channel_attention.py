"""Channel attention, as it is defined."""

import torch

from .precision import without_autocast


@without_autocast
def channel_attention(image, text, weight, bias=None, *, need_weights=False):
    """See :func:`mmkernels.channel_attention`. Runs in float32 (float64 for float64) inside."""
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    image, text, weight = (t.to(accumulate) for t in (image, text, weight))
    if image.dim() == 3:
        text = text[:, None].expand(-1, image.shape[1], -1)
    scores = torch.cat([image, text], -1) @ weight.T
    weights = (scores if bias is None else scores + bias.to(accumulate)).softmax(-1)
    result = (image * weights).to(dtype)
    return (result, weights.to(dtype)) if need_weights else result
