"""Each operation in plain PyTorch: the definition, and the truth that tests compare with.

Same names and arguments as in :mod:`mmkernels.functional`, without ``backend`` and ``out``.
"""

from .absorbed_attention import absorbed_attention
from .additive_attention import additive_attention
from .bidirectional_attention import bidirectional_attention
from .channel_attention import channel_attention
from .deformable_attention import deformable_attention
from .gated_cross_attention import gated_cross_attention
from .spatial_attention import spatial_attention

__all__ = [
    "absorbed_attention",
    "additive_attention",
    "bidirectional_attention",
    "channel_attention",
    "deformable_attention",
    "gated_cross_attention",
    "spatial_attention",
]
