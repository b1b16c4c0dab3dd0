"""Deformable attention, as it is defined."""

import itertools

import torch

from .gated_cross_attention import safe_softmax
from .precision import without_autocast


@without_autocast
def deformable_attention(value, spatial_shapes, locations, scores, *, points=None, mask=None, softmax=True):
    """See :func:`mmkernels.deformable_attention`. Runs in float32 (float64 for float64) inside."""
    dtype = value.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    value, locations, scores = (t.to(accumulate) for t in (value, locations, scores))
    if points is None:
        points = [locations.shape[4]] * locations.shape[3]
        locations, scores = locations.flatten(3, 4), scores.flatten(3, 4)
    if mask is not None:
        value = value.where(mask[:, :, None, None], 0)
    weights = safe_softmax(scores, -1) if softmax else scores

    # Of each of the K points: its level's height and width, and where that begins.
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, torch.Tensor) else spatial_shapes
    begins = itertools.accumulate((y * x for y, x in shapes), initial=0)
    levels = [(y, x, begin) for (y, x), begin, count in zip(shapes, begins, points) for _ in range(count)]
    height, width, begin = torch.as_tensor(levels, device=value.device, dtype=torch.int64).view(-1, 3).unbind(1)

    # A position's center is half a pixel from its edges. What is outside, NaN and Inf too, is a constant.
    sizes = torch.stack([width, height], -1)
    pixel = locations * sizes - 0.5
    pixel = pixel.where(((pixel >= -1) & (pixel < sizes)).all(-1, keepdim=True), -2)
    low = pixel.detach().floor()
    x, y = (pixel - low).unbind(-1)
    samples = 0
    for right in (False, True):
        for below in (False, True):
            column, row = low[..., 0] + right, low[..., 1] + below
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            position = begin + row.where(inside, 0).long() * width + column.where(inside, 0).long()
            corner = _gather(value, position).where(inside[..., None], 0)
            share = (x if right else 1 - x) * (y if below else 1 - y)
            samples = samples + share[..., None] * corner
    return (weights[..., None] * samples).sum(3).flatten(2).to(dtype)


def _gather(value, position):
    """``value`` ``[B, S, H, d]`` at ``position`` ``[B, Q, H, K]`` of each head: ``[B, Q, H, K, d]``."""
    batch, _, heads, _ = value.shape
    index = lambda size, *shape: torch.arange(size, device=value.device).view(shape)
    return value[index(batch, -1, 1, 1, 1), position, index(heads, 1, 1, -1, 1)]
