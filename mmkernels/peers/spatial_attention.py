import torch

__all__ = ["spatial_attention"]


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
