"""Spatial attention, as it is defined."""

import torch

from .bags import Bags, bag_bounds
from .precision import without_autocast


@without_autocast
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
    """See :func:`mmkernels.spatial_attention`. Runs in float32 (float64 for float64) inside."""
    offsets = bag_bounds(offsets, image)
    if offsets is not None:
        result, weights = _packed(image, text, mask, offsets, scale, num_heads, combine == "pool", rescale)
        return (result, weights) if need_weights else result
    grid = image.shape[2:]
    if layout == "bdhw":
        image = image.flatten(2).transpose(1, 2)
        mask = None if mask is None else mask.flatten(1)

    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    batch, positions, channels = image.shape
    width = channels // num_heads
    scale = width**-0.5 if scale is None else scale
    part = torch.ones(batch, positions, dtype=torch.bool, device=image.device) if mask is None else mask

    # What is masked out may hold NaN: it is replaced before any arithmetic can spread it.
    x = image.to(accumulate).masked_fill(~part[:, :, None], 0).reshape(batch, positions, num_heads, width)
    t = text.to(accumulate).reshape(batch, num_heads, width)
    scores = torch.einsum("bnhc,bhc->bhn", x, t) * scale
    # A sample without any position keeps finite scores, so that its weights and gradients become 0, not NaN.
    some = part.any(1)[:, None, None]
    scores = scores.masked_fill(~part[:, None] & some, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~part[:, None], 0)
    if rescale:
        weights = weights * part.sum(1)[:, None, None]

    if combine == "pool":
        result = torch.einsum("bhn,bnhc->bhc", weights, x).reshape(batch, channels).to(dtype)
    else:
        result = (weights.transpose(1, 2)[..., None] * x).reshape(batch, positions, channels).to(dtype)
        if layout == "bdhw":
            result = result.transpose(1, 2).unflatten(2, grid)
    return (result, weights) if need_weights else result


def _packed(image, text, mask, offsets, scale, num_heads, pool, rescale):
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    rows, channels = image.shape
    width = channels // num_heads
    scale = width**-0.5 if scale is None else scale
    bags = Bags.of(offsets, rows)
    part = torch.ones(rows, dtype=torch.bool, device=image.device) if mask is None else mask

    x = image.to(accumulate).masked_fill(~part[:, None], 0).reshape(rows, num_heads, width)
    t = text.to(accumulate).reshape(bags.count, num_heads, width)
    weights = bags.softmax((x * bags.spread(t)).sum(-1) * scale, part)
    if rescale:
        weights = weights * bags.spread(bags.sums(part.long()))[:, None]

    result = weights[..., None] * x
    result = bags.sums(result) if pool else result
    return result.flatten(1).to(dtype), weights.T
