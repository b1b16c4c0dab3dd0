"""Optional packages, imported where they are used."""

import importlib


def require(module, extra="demo"):
    """Imports an optional module, or says how to install it.

    Raises:
        ImportError: it isn't installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r} ({error}): pip install mmkernels[{extra}]"
        ) from error
