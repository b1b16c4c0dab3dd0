"""What test_triton_compile.py compiles. A file an operation:

KERNELS        the names of all its kernels
SHARED_BUDGET  shared memory that a program may take; where nothing is said: room for four on a multiprocessor
PROBLEMS       {problem: (shape, dtype, options)}
launch(module, shape, dtype, **options)  calls the operation's Triton module, forward and backward
"""

import importlib

from mmkernels import functional

OPERATIONS = {name: importlib.import_module(f".{name}", __name__) for name in functional.__all__}
