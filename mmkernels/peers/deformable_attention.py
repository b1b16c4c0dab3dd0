import torch
from torch.nn.functional import grid_sample

__all__ = ["deformable_attention"]


def deformable_attention(value, spatial_shapes, locations, scores, *, points=None, mask=None, softmax=True):
    """As public models have it: ``grid_sample`` a level, the samples stacked, multiplied, and summed.

    Samples are taken in float32: PyTorch's own ``grid_sample`` in bfloat16 gives garbage on the CPU.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    if points is None:
        points = [locations.shape[4]] * locations.shape[3]
        locations, scores = locations.flatten(3, 4), scores.flatten(3, 4)
    if mask is not None:
        value = value.masked_fill(~mask[:, :, None, None], 0)
    weights = (scores.softmax(-1) if softmax else scores).to(value.dtype)
    sampling = torch.promote_types(value.dtype, torch.float32)
    locations = locations.to(sampling).nan_to_num(-1, -1, -1)  # outside, where PyTorch would sample NaN
    grids = (2 * locations - 1).split(list(points), 3)
    samples = []
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, torch.Tensor) else spatial_shapes
    levels = value.split([y * x for y, x in shapes], 1)
    for level, (y, x), grid in zip(levels, shapes, grids):
        plane = level.to(sampling).permute(0, 2, 3, 1).reshape(batch * heads, channels, y, x)
        grid = grid.transpose(1, 2).flatten(0, 1)
        if grid.shape[2]:
            sample = grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            samples.append(sample.to(value.dtype))
    stacked = torch.cat(samples, -1) if samples else value.new_zeros(batch * heads, channels, queries, 0)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]
    return (stacked * weights).sum(-1).view(batch, heads * channels, queries).mT.contiguous()
