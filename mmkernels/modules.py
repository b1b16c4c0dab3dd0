"""The operations as modules: they hold the projections that bring text to the image's channels."""

import torch
from torch import nn

from . import functional


class SpatialAttention(nn.Module):
    """Projects the text to the image's channels and weighs every image position by how well it matches.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, size of the text vector.
        num_heads: H, divides ``image_dim``.
        combine, rescale, layout, scale: as in :func:`mmkernels.spatial_attention`.
        bias: whether the text projection has a bias.
        backend: as in :func:`mmkernels.spatial_attention`; ``"reference"`` gives the plain layer.

    Shape:
        image ``[B, N, D]`` or ``[B, D, Y, X]`` (by ``layout``), text ``[B, E]`` ->
        like image (``combine="multiply"``) or ``[B, D]`` (``"pool"``).
    """

    def __init__(self, image_dim, text_dim, *, num_heads=1, combine="multiply", rescale=False, layout="bnd",
                 scale=None, bias=True, backend=None, device=None, dtype=None):
        super().__init__()
        if image_dim % num_heads:
            raise ValueError(f"num_heads must divide image_dim {image_dim}, got {num_heads}")
        self.image_dim, self.text_dim, self.num_heads = image_dim, text_dim, num_heads
        self.combine, self.rescale, self.layout, self.scale = combine, rescale, layout, scale
        self.backend = backend
        self.text_projection = nn.Linear(text_dim, image_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, image, text, *, mask=None, offsets=None, need_weights=False):
        return functional.spatial_attention(
            image, self.text_projection(text), mask=mask, offsets=offsets, scale=self.scale, num_heads=self.num_heads,
            combine=self.combine, rescale=self.rescale, layout=self.layout, need_weights=need_weights,
            backend=self.backend)

    def extra_repr(self):
        return (f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, "
                f"combine={self.combine!r}, rescale={self.rescale}, layout={self.layout!r}, backend={self.backend!r}")
