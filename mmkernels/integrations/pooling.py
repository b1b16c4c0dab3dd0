"""What pooling heads of several packages share: few queries, a long image, projections that may be absorbed."""

from .. import backends, functional
from ..modules.absorb import absorb_heads, multiply_adds, project_pooled
from ..modules.common import PLAIN_TENSORS, is_plain_linear, meet
from ..torch_private import known_true
from .patching import exported


def absorbed_pooling(image, query, key_weight, value_weight, value_bias, scale, *, image_mask=None, key_bias=None):
    """``softmax(scale query key(image)^T) value(image)``, with the image read once as it is.

    The key projection's bias adds the same to a query's scores of all positions, which cancels in the softmax.

    Args:
        image: ``[B, N, D]``. query: ``[B, H, T, d]``, projected.
        key_weight, value_weight: ``[H d, D]``. value_bias: ``[H d]`` or None.
        scale: of the scores.
        image_mask: bool ``[B, N]``, True = takes part.
        key_bias: only given so that it gets its gradient, 0.

    Returns:
        ``[B, T, H d]``, before the projection of the result.
    """
    key = absorb_heads(query, key_weight, scale)
    _, pooled = functional.absorbed_attention(image, key, image_mask=image_mask)
    if value_bias is not None and key_bias is not None:
        value_bias = value_bias + 0 * key_bias  # data-parallel training waits for a gradient of every parameter
    pooled = project_pooled(pooled, value_weight, value_bias, query.shape[3], image_mask)
    return pooled.transpose(1, 2).flatten(2)


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


def plain_linears(*modules):
    """The first that isn't a plain ``nn.Linear``, as a reason; None if all are."""
    for module in modules:
        if not is_plain_linear(module):
            return f"its projection is a {type(module).__name__}, not a plain Linear without hooks"
    return None
