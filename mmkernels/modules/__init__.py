"""The operations as modules: they hold the projections that bring text to the image's channels.

The projections are submodules that are used as such: hooks on them, wrappers around them (LoRA), pruning,
parametrizations, quantisation and tensor parallelism take effect. Heads are split by their width, so that a rank that
holds a part of the channels holds whole heads.

Each operation has a file here, under its own name, whose ``__all__`` names the modules.
"""

from ..operation_files import public_names

_found = public_names(__name__)
globals().update(_found)
__all__ = [*_found]
