"""Fused score -> softmax -> multiply kernels for image and text features."""

from . import versions  # noqa: F401, I001  (first: it refuses a torch that is too old)
from . import functional, integrations, modules, ops, reference
from .backends import BackendError
from .functional import *  # noqa: F403
from .integrations import PatchReport, patch, unpatch
from .modules import *  # noqa: F403
from .modules.absorb import absorb_pays
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "PatchReport",
    "absorb_pays",
    "functional",
    "integrations",
    "patch",
    "reference",
    "unpatch",
    *functional.__all__,
    *modules.__all__,
    *ops.__all__,
]
