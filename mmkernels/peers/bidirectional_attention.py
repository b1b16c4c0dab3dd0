from torch.nn.functional import scaled_dot_product_attention

from .common import masked_softmax

__all__ = ["bidirectional_attention", "bidirectional_attention_sdpa"]


def bidirectional_attention(
    image_query, text_key, image_value, text_value, *, image_mask=None, text_mask=None, scale=None
):
    """One score matrix, two softmaxes, two products."""
    scores = image_query @ text_key.mT * (image_query.shape[-1] ** -0.5 if scale is None else scale)
    over_text = None if text_mask is None else text_mask[:, None, None].expand_as(scores)
    over_image = None if image_mask is None else image_mask[:, None, None].expand_as(scores.mT)
    return masked_softmax(scores, over_text) @ text_value, masked_softmax(scores.mT, over_image) @ image_value


def bidirectional_attention_sdpa(
    image_query, text_key, image_value, text_value, *, image_mask=None, text_mask=None, scale=None
):
    """PyTorch's fused attention, once each way."""
    over_text = None if text_mask is None else text_mask[:, None, None]
    over_image = None if image_mask is None else image_mask[:, None, None]
    return (
        scaled_dot_product_attention(image_query, text_key, text_value, attn_mask=over_text, scale=scale),
        scaled_dot_product_attention(text_key, image_query, image_value, attn_mask=over_image, scale=scale),
    )
