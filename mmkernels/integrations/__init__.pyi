from . import transformers as transformers
from .patching import PatchReport as PatchReport
from .patching import Replacement as Replacement
from .patching import patch as patch
from .patching import register as register
from .patching import unpatch as unpatch

__all__: list[str]
