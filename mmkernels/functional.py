"""The operations as functions. This list names them: what else is found by name follows it."""

__all__ = [
    "absorbed_attention",
    "additive_attention",
    "bidirectional_attention",
    "channel_attention",
    "deformable_attention",
    "gated_cross_attention",
    "spatial_attention",
]  # before what is imported, which reads it

from .ops.absorbed_attention import absorbed_attention
from .ops.additive_attention import additive_attention
from .ops.bidirectional_attention import bidirectional_attention
from .ops.channel_attention import channel_attention
from .ops.deformable_attention import deformable_attention
from .ops.gated_cross_attention import gated_cross_attention
from .ops.spatial_attention import spatial_attention
