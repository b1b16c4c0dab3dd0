"""The operations as functions."""

from .ops.bidirectional_attention import bidirectional_attention
from .ops.gated_cross_attention import gated_cross_attention
from .ops.spatial_attention import spatial_attention

__all__ = ["bidirectional_attention", "gated_cross_attention", "spatial_attention"]
