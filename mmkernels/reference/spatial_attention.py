"""Spatial attention, as it is defined."""

import torch

from .precision import without_autocast


@without_autocast
def spatial_attention(image, text, *, mask=None, offsets=None, scale=None, num_heads=1,
                      combine="multiply", rescale=False, layout="bnd", need_weights=False):
    """See :func:`mmkernels.spatial_attention`. Runs in float32 (float64 for float64) inside."""
    if offsets is not None:
        return _packed(image, text, mask, offsets, scale=scale, num_heads=num_heads,
                       combine=combine, rescale=rescale, need_weights=need_weights)
    grid = image.shape[2:]
    if layout == "bdhw":
        image = image.flatten(2).transpose(1, 2)
        mask = None if mask is None else mask.flatten(1)

    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    batch, positions, channels = image.shape
    width = channels // num_heads
    scale = width ** -0.5 if scale is None else scale
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


def _packed(image, text, mask, offsets, *, need_weights, **options):
    """One bag after another."""
    bounds = offsets.tolist()
    results, weights = [], []
    for bag, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        result, weight = spatial_attention(
            image[None, start:stop], text[bag:bag + 1],
            mask=None if mask is None else mask[None, start:stop], need_weights=True, **options)
        results.append(result if options["combine"] == "pool" else result[0])
        weights.append(weight[0])
    if results:
        result, weight = torch.cat(results), torch.cat(weights, -1)
    else:                                         # no bags, so no rows: empty, yet differentiable
        accumulate = torch.float64 if image.dtype == torch.float64 else torch.float32
        result = text + image.sum(0) if options["combine"] == "pool" else image + text.sum(0)
        weight = (image.sum(1) + text.sum()).to(accumulate).expand(options["num_heads"], -1)
    return (result, weight) if need_weights else result
