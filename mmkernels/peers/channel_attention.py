from torch.nn.functional import linear

from ..reference.channel_attention import concatenate

__all__ = ["channel_attention", "channel_attention_split"]


def channel_attention(image, text, weight, bias=None, *, need_weights=False):
    """Concatenation and one product, as the formula is written. Weights come in image's dtype."""
    weights = linear(concatenate(image, text), weight, bias).softmax(-1)
    return (image * weights, weights) if need_weights else image * weights


def channel_attention_split(image, text, weight, bias=None, *, need_weights=False):
    """The text's part of the product once a sample."""
    of_text = linear(text, weight[:, image.shape[-1] :], bias)
    weights = (
        linear(image, weight[:, : image.shape[-1]]) + (of_text if image.dim() == 2 else of_text[:, None])
    ).softmax(-1)
    return (image * weights, weights) if need_weights else image * weights
