"""Reference models built on the fused operations, and published ones written out with them."""

from . import architectures as architectures  # they make themselves known to ImageTextModel
from .bottom_up import TopDownCaptioner
from .image_text import ImageTextModel
from .lavt import LanguageGate, PixelWordAttention
from .mil import AttentionMIL, ClamOutput, ClamSB
from .san import StackedAttentionNetwork

__all__ = [
    "AttentionMIL",
    "ClamOutput",
    "ClamSB",
    "ImageTextModel",
    "LanguageGate",
    "PixelWordAttention",
    "StackedAttentionNetwork",
    "TopDownCaptioner",
]
