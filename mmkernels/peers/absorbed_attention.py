from .common import masked_softmax

__all__ = ["absorbed_attention"]


def absorbed_attention(image, key, value=None, *, key_bias=None, image_mask=None, text_mask=None, pool=True):
    """All heads' tokens as columns of one product, two softmaxes, two products: what plain PyTorch does best."""
    heads, tokens = key.shape[1:3]
    key = key.to(image.dtype)
    scores = (image @ key.flatten(1, 2).mT).unflatten(2, (heads, tokens))
    if key_bias is not None:
        scores = scores + key_bias.to(image.dtype)[:, None]
    image_out = text_out = None
    if value is not None:
        part = None if text_mask is None else text_mask[:, None, None].expand_as(scores)
        image_out = masked_softmax(scores, part).flatten(2) @ value.to(image.dtype).flatten(1, 2)
    if pool:
        columns = scores.flatten(2).mT
        part = None if image_mask is None else image_mask[:, None].expand_as(columns)
        text_out = (masked_softmax(columns, part) @ image).unflatten(1, (heads, tokens))
    return image_out, text_out
