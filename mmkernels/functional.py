"""The operations as functions."""

from .ops.spatial_attention import spatial_attention

__all__ = ["spatial_attention"]
