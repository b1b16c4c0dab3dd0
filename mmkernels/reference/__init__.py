"""Each operation in plain PyTorch: the definition, and the truth that tests compare with.

Same names and arguments as in :mod:`mmkernels.functional`, without ``backend`` and ``out``.
"""

from .spatial_attention import spatial_attention

__all__ = ["spatial_attention"]
