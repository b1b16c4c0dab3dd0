"""The operations as people write them in plain PyTorch today.

They run in the tensors' own dtype. The benchmark competes with them, eager and compiled, and the tolerance rule takes
their error as its measure. Same names and arguments as in :mod:`mmkernels.functional`, without ``backend`` and ``out``;
each operation has a file here, under its own name, whose ``__all__`` is its peer and that one's variants.
"""

from ..operation_files import public_names
from .common import compiled

_found = public_names(__name__)
globals().update(_found)
__all__ = ["compiled", *_found]
