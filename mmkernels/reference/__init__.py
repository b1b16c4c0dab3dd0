"""Each operation in plain PyTorch: the definition, and the truth that tests compare with.

Same names and arguments as in :mod:`mmkernels.functional`, without ``backend`` and ``out``.
"""

from .. import functional
from ..operation_files import files

__all__ = [*functional.__all__]
globals().update({name: getattr(file, name) for name, file in zip(__all__, files(__name__))})
