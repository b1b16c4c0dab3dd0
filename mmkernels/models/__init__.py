"""Reference models built on the fused operations, and published ones written out with them."""

from .bottom_up import TopDownCaptioner
from .image_text import ImageTextModel
from .lavt import LanguageGate, PixelWordAttention
from .san import StackedAttentionNetwork

__all__ = ["ImageTextModel", "LanguageGate", "PixelWordAttention", "StackedAttentionNetwork", "TopDownCaptioner"]
