"""What pooling heads of several packages share: few queries, a long image, projections that may be absorbed."""

import torch
from torch import nn
from torch.nn.functional import linear

from .. import backends
from ..modules.absorb import absorbed_pooling, multiply_adds
from ..modules.common import PLAIN_TENSORS, is_plain, is_plain_linear, join_heads, meet
from ..reference.precision import autocast_is_on
from ..torch_private import known_true
from .patching import exported


def attend(image, queries, weights, biases, heads, scale, image_mask=None):
    """Multi-head attention of a few queries before the projection of its result: ``[B, T, H d]``.

    Args:
        image: ``[B, N, D]``. queries: ``[B, T, E]``, not yet projected.
        weights, biases: of query, key and value.
        scale: of the scores.
        image_mask: bool ``[B, N]``, True = takes part.
    """
    query = linear(queries, weights[0], biases[0]).unflatten(2, (heads, -1)).transpose(1, 2)
    _, key_bias, value_bias = biases
    return join_heads(
        absorbed_pooling(image, query, *weights[1:], value_bias, scale, image_mask=image_mask, key_bias=key_bias)
    )


def pays(image, tokens, heads, width, *weights):
    """Whether `tokens` queries pool the image in fewer operations with both projections absorbed, and may: all weights
    are plain tensors of the image's device and of its dtype, or of one that autocast brings to it."""
    if exported() or image.dim() != 3 or image.shape[1] == 0 or tokens == 0:
        return False
    for weight in weights:
        if type(weight) not in PLAIN_TENSORS or not meet(image, weight):
            return False
    if not any(
        backends.why_not(name, "absorbed_attention", image.device.type, image.dtype) is None
        for name in ("cpu", "cuda", "triton")
    ):
        return False
    positions, channels = image.shape[1:]
    projected, absorbed = multiply_adds(positions, tokens, channels, heads * width, heads, None, True)
    return known_true(absorbed < projected)


def learned(query, samples, *modules):
    """A learned query ``[1, T, E]``, for modules that it goes through: once for all samples, but for each one where
    somebody would notice, as a hook does, or LoRA's dropout."""
    if all(is_plain_linear(module) or is_plain(module, nn.Identity) for module in modules):
        return query
    return query.expand(samples, -1, -1)


def projected_dtype(features):
    """What a plain projection of features gives: autocast leaves float64 alone."""
    device = features.device.type
    if features.dtype == torch.float64 or not autocast_is_on(device):
        return features.dtype
    return torch.get_autocast_dtype(device)


def plain_linears(*modules):
    """The first that isn't a plain ``nn.Linear``, as a reason; None if all are."""
    for module in modules:
        if not is_plain_linear(module):
            return f"its projection is a {type(module).__name__}, not a plain Linear without hooks"
    return None


def chunks(bias, count):
    """Of packed projections: each one's bias."""
    return (None,) * count if bias is None else bias.chunk(count)
