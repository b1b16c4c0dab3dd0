"""How PyTorch sees each operation: checks, backend choice, fake, autograd, vmap, and the public function.

Here are the autograd Functions; the functions are in :mod:`mmkernels.functional`.
"""

from ..operation_files import files

_found = {file.OPERATION.Function.__name__: file.OPERATION.Function for file in files(__name__)}
globals().update(_found)
__all__ = [*_found]
