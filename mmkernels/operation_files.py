"""Packages that hold one file an operation, and how they find those files: by the list in :mod:`mmkernels.functional`.

Only that list names the operations; a package of this kind needs no list of its own.
"""

import importlib

from . import functional


def public_names(package):
    """{name: object} of the ``__all__`` of every operation's file in `package`, in the operations' order."""
    found = {}
    for operation in functional.__all__:
        module = importlib.import_module(f"{package}.{operation}")
        found |= {name: getattr(module, name) for name in module.__all__}
    return found
