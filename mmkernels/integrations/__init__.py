"""Where other packages' models plug in: :func:`patch` and :func:`unpatch`, and a module for each package, by its name
(``mmkernels.integrations.transformers``), which needs that package and is imported when it is first named."""

import importlib

from .patching import PatchReport, Replacement, patch, register, unpatch

__all__ = ["PatchReport", "Replacement", "patch", "register", "unpatch"]
PACKAGES = ("diffusers", "keras", "kernels", "transformers")


def __getattr__(name):
    if name in PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
