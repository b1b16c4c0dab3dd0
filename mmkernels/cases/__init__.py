"""The inputs that tests and ``python -m mmkernels verify`` run every backend on.

Each operation has a file here, under its own name: ``generate()`` yields its :class:`Case` objects; ``OUTPUTS`` names
what it returns, where that isn't a result and weights, and ``PARAMETERS`` the arguments that all samples share, if
there are any. A case draws its tensors from a seed, in the dtype and on the device that are asked for, and returns the
operation's arguments by name. Every floating-point tensor among them gets a gradient.
"""

import importlib

from .common import DTYPES, SMALL, Case, Draw
from .layouts import contiguous, window

__all__ = ["DTYPES", "SMALL", "Case", "Draw", "contiguous", "is_slow", "outputs", "parameters", "selected", "window"]


def selected(operation, *, small=False):
    """The cases of an operation, by its name."""
    return [case for case in _file(operation).generate() if case.small or not small]


def outputs(operation):
    """The names of what an operation returns; the last may be left out."""
    return getattr(_file(operation), "OUTPUTS", ("result", "weights"))


def parameters(operation):
    """The names of the arguments that all samples share."""
    return getattr(_file(operation), "PARAMETERS", ())


def is_slow(backend, device_type):
    """Whether a backend is executed for correctness alone (emulated CUDA, interpreted Triton)."""
    return backend.endswith("-emulated") or (backend == "triton" and device_type == "cpu")


def _file(operation):
    return importlib.import_module(f"{__name__}.{operation}")
