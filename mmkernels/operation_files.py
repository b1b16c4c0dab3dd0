"""Packages that hold one file an operation, and how they find those files: by the list in :mod:`mmkernels.functional`.

Only that list names the operations; a package of this kind needs no list of its own.
"""

import importlib

from . import functional


def files(package):
    """The module of each operation in `package`, in the operations' order."""
    return [importlib.import_module(f"{package}.{operation}") for operation in functional.__all__]


def public_names(package):
    """{name: object} of the ``__all__`` of every operation's file in `package`."""
    return {name: getattr(file, name) for file in files(package) for name in file.__all__}
