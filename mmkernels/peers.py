"""The operations as people write them in plain PyTorch today.

They run in the tensors' own dtype. The benchmark competes with them, eager and compiled, and the tolerance rule takes
their error as its measure. Same names and arguments as in :mod:`mmkernels.functional`, without ``backend`` and ``out``.
"""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from .reference.additive_attention import ACTIVATIONS
from .reference.channel_attention import concatenate
from .reference.gated_cross_attention import full_mask


def compiled(function, *, dynamic=False):
    """`function` under torch.compile, with default settings and a compilation of its own."""

    def fresh(*args, **kwargs):  # a new code object: peers don't share one cache of graphs
        return function(*args, **kwargs)

    fresh.__code__ = fresh.__code__.replace(co_name=f"compiled_{function.__name__}")
    return torch.compile(fresh, dynamic=dynamic)


def spatial_attention(
    image,
    text,
    *,
    mask=None,
    offsets=None,
    scale=None,
    num_heads=1,
    combine="multiply",
    rescale=False,
    layout="bnd",
    need_weights=False,
):
    """einsum, softmax, multiply. Weights come in image's dtype."""
    options = {"scale": scale, "num_heads": num_heads, "combine": combine, "rescale": rescale, "layout": layout}
    if offsets is None:
        result, weights = _spatial(image, text, mask, **options)
    else:  # bags: one after another, as most code does
        bounds = offsets.tolist()
        bags = [
            _spatial(
                image[None, start:stop], text[i : i + 1], None if mask is None else mask[None, start:stop], **options
            )
            for i, (start, stop) in enumerate(zip(bounds, bounds[1:]))
        ]
        pool = combine == "pool"
        result = torch.cat([r if pool else r[0] for r, _ in bags]) if bags else (text if pool else image) * 1
        weights = torch.cat([w[0] for _, w in bags], -1) if bags else image.new_zeros(num_heads, 0)
    return (result, weights) if need_weights else result


def _spatial(image, text, mask, *, scale, num_heads, combine, rescale, layout):
    split = (num_heads, -1) if image.shape[1 if layout == "bdhw" else -1] else (num_heads, 0)
    text = text.unflatten(1, split)
    scale = text.shape[-1] ** -0.5 if scale is None else scale
    if layout == "bdhw":
        heads = image.unflatten(1, split)
        scores = torch.einsum("bhcyx,bhc->bhyx", heads, text).flatten(2) * scale
        mask = None if mask is None else mask.flatten(1)
    else:
        heads = image.unflatten(2, split)
        scores = torch.einsum("bnhc,bhc->bhn", heads, text) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:  # samples without any position
        weights = weights.masked_fill(~mask[:, None], 0)
    if rescale:
        weights = weights * (scores.shape[-1] if mask is None else mask.sum(1)[:, None, None])

    if layout == "bdhw":
        spread = weights.unflatten(2, image.shape[2:])
        if combine == "pool":
            return torch.einsum("bhcyx,bhyx->bhc", heads, spread).flatten(1), weights
        return (heads * spread[:, :, None]).flatten(1, 2), weights
    if combine == "pool":
        return torch.einsum("bnhc,bhn->bhc", heads, weights).flatten(1), weights
    return (heads * weights.transpose(1, 2)[..., None]).flatten(2), weights


def gated_cross_attention(query, key, value, gate=None, *, attn_mask=None, scale=None, need_weights=False):
    """Two products and a softmax. Weights come in query's dtype."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = _masked_softmax(scores, full_mask(attn_mask, query, key))
    result = weights @ value
    result = result if gate is None else gate * result
    return (result, weights) if need_weights else result


def gated_cross_attention_sdpa(query, key, value, gate=None, *, attn_mask=None, scale=None):
    """PyTorch's fused attention, and a multiplication."""
    attn_mask = full_mask(attn_mask, query, key)
    result = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    return result if gate is None else gate * result


def _masked_softmax(scores, mask):
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype != torch.bool:
        return (scores + mask.to(scores.dtype)).softmax(-1)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask.any(-1, keepdim=True)


def bidirectional_attention(
    image_query, text_key, image_value, text_value, *, image_mask=None, text_mask=None, scale=None
):
    """One score matrix, two softmaxes, two products."""
    scores = image_query @ text_key.mT * (image_query.shape[-1] ** -0.5 if scale is None else scale)
    over_text = None if text_mask is None else text_mask[:, None, None].expand_as(scores)
    over_image = None if image_mask is None else image_mask[:, None, None].expand_as(scores.mT)
    return _masked_softmax(scores, over_text) @ text_value, _masked_softmax(scores.mT, over_image) @ image_value


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


def additive_attention(
    image,
    query,
    w_image,
    w_query,
    v,
    *,
    bias=None,
    w_gate=None,
    bias_gate=None,
    activation="tanh",
    mask=None,
    offsets=None,
    combine="pool",
    need_weights=False,
):
    """Linear layers, activation, softmax, weighted sum. Weights come in image's dtype."""
    network = {
        "v": v,
        "w_image": w_image,
        "w_gate": w_gate,
        "bias_gate": bias_gate,
        "activation": activation,
        "combine": combine,
    }
    shift = bias if query is None else linear(query, w_query, bias)
    if offsets is None:
        result, weights = _additive(
            image, None if shift is None else shift if shift.dim() == 1 else shift[:, None], mask, **network
        )
    else:  # bags: one after another, as most code does
        bounds = offsets.tolist()
        bags = [
            _additive(
                image[None, start:stop],
                shift if shift is None or shift.dim() == 1 else shift[i : i + 1, None],
                None if mask is None else mask[None, start:stop],
                **network,
            )
            for i, (start, stop) in enumerate(zip(bounds, bounds[1:]))
        ]
        pool = combine == "pool"
        result = (
            torch.cat([r if pool else r[0] for r, _ in bags])
            if bags
            else image.new_zeros((0, len(v), image.shape[1]) if pool else image.shape)
        )
        weights = torch.cat([w[0] for _, w in bags], -1) if bags else image.new_zeros(len(v), 0)
    return (result, weights) if need_weights else result


def _additive(image, shift, mask, *, v, w_image, w_gate, bias_gate, activation, combine):
    hidden = linear(image, w_image)
    hidden = ACTIVATIONS[activation](hidden if shift is None else hidden + shift)
    if w_gate is not None:
        hidden = hidden * torch.sigmoid(linear(image, w_gate, bias_gate))
    weights = _masked_softmax(linear(hidden, v).mT, None if mask is None else mask[:, None])
    return (weights @ image if combine == "pool" else weights.mT * image), weights
