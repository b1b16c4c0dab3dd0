"""Each operation in plain PyTorch: the definition, and the truth that tests compare with.

Same names and arguments as in :mod:`mmkernels.functional`, without ``backend`` and ``out``.
"""

from .bidirectional_attention import bidirectional_attention
from .gated_cross_attention import gated_cross_attention
from .spatial_attention import spatial_attention

__all__ = ["bidirectional_attention", "gated_cross_attention", "spatial_attention"]
