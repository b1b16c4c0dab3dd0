"""Fused score -> softmax -> multiply kernels for image and text features."""

from . import versions  # noqa: F401, I001  (first: it refuses a torch that is too old)
from . import functional, integrations, modules, reference
from .backends import BackendError
from .functional import *  # noqa: F403
from .integrations import PatchReport, patch, unpatch
from .modules import *  # noqa: F403
from .modules.absorb import absorb_pays
from .ops.absorbed_attention import AbsorbedAttentionFunction
from .ops.additive_attention import AdditiveAttentionFunction
from .ops.bidirectional_attention import BidirectionalAttentionFunction
from .ops.channel_attention import ChannelAttentionFunction
from .ops.deformable_attention import DeformableAttentionFunction
from .ops.gated_cross_attention import GatedCrossAttentionFunction
from .ops.spatial_attention import SpatialAttentionFunction

__version__ = "0.1.0"
__all__ = [
    "AbsorbedAttentionFunction",
    "AdditiveAttentionFunction",
    "BackendError",
    "BidirectionalAttentionFunction",
    "ChannelAttentionFunction",
    "DeformableAttentionFunction",
    "GatedCrossAttentionFunction",
    "PatchReport",
    "SpatialAttentionFunction",
    "absorb_pays",
    "functional",
    "integrations",
    "patch",
    "reference",
    "unpatch",
    *functional.__all__,
    *modules.__all__,
]
