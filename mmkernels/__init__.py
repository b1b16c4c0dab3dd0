"""Fused score -> softmax -> multiply kernels for image and text features."""

from . import functional, reference
from .backends import BackendError
from .functional import *  # noqa: F403
from .modules import BidirectionalAttention, GatedCrossAttention, SpatialAttention
from .ops.bidirectional_attention import BidirectionalAttentionFunction
from .ops.gated_cross_attention import GatedCrossAttentionFunction
from .ops.spatial_attention import SpatialAttentionFunction

__version__ = "0.1.0"
__all__ = ["BackendError", "BidirectionalAttention", "BidirectionalAttentionFunction", "GatedCrossAttention",
           "GatedCrossAttentionFunction", "SpatialAttention", "SpatialAttentionFunction", "functional", "reference",
           *functional.__all__]
