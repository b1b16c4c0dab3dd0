"""Channel attention, as it is defined."""

import torch

from .precision import without_autocast


@without_autocast
def channel_attention(image, text, weight, bias=None, *, need_weights=False):
    """See :func:`mmkernels.channel_attention`. Runs in float32 (float64 for float64) inside."""
    accumulate = torch.float64 if image.dtype == torch.float64 else torch.float32
    scores = concatenate(image, text).to(accumulate) @ weight.to(accumulate).T
    result, weights = multiply_channels(image, scores if bias is None else scores + bias.to(accumulate))
    return (result, weights) if need_weights else result


def concatenate(image, text):
    """``[image_n ; text_b]``, at every position."""
    return torch.cat([image, text if image.dim() == 2 else text[:, None].expand(-1, image.shape[1], -1)], -1)


@without_autocast
def multiply_channels(image, scores):
    """(result, weights) of scores like image."""
    accumulate = torch.float64 if image.dtype == torch.float64 else torch.float32
    weights = scores.to(accumulate).softmax(-1)
    return (image.to(accumulate) * weights).to(image.dtype), weights.to(image.dtype)
