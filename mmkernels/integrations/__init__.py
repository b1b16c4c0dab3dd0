"""Where other packages' models plug in: :func:`patch` and :func:`unpatch`, and a module for each package, imported by
its name (``mmkernels.integrations.transformers``), which needs that package."""

from .patching import PatchReport, Replacement, patch, register, unpatch

__all__ = ["PatchReport", "Replacement", "patch", "register", "unpatch"]
