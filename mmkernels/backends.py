"""Which implementation runs: `cpu` (C++), `cuda` (CUDA C++), `triton`, or `reference` (plain PyTorch).

A backend is a name, a dictionary of operations, and a rule that tells why it can't run on a device. `choose` takes the
first in ORDER that can run (but for what is ONLY_WHEN_ASKED); a forced backend that can't raises `BackendError`, which
lists every backend's reason.
"""

import importlib
import importlib.util
import os
import warnings

import torch

from .torch_private import constant_while_traced

ORDER = ("cuda", "triton", "cpu", "reference")

# Triton's interpreter executes kernels on CPU tensors to test them: taken by name only, it is never the fastest.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

_operations = {}  # backend -> {operation: callable}
_modules = {}  # (backend, operation) -> the module that implements it when it is imported
_reasons = {}  # backend -> function(device type, dtype) -> None, or why it can't run


class BackendError(RuntimeError):
    """A backend that was asked for by name can't run these arguments."""


def _load_extension():
    try:
        return importlib.import_module("mmkernels._C"), None
    except ImportError as error:
        return None, f"the compiled extension mmkernels._C can't be loaded ({error})"


extension, extension_error = _load_extension()
_chosen = {}  # (operation, device, dtype, backend or None) -> what runs it


def register(backend, why_not):
    """Adds a backend. `why_not(device_type, dtype)` returns None where it can run, else the reason."""
    _operations.setdefault(backend, {})
    _reasons[backend] = why_not
    _chosen.clear()


def implement(backend, operation, function):
    """Adds an operation to a registered backend."""
    _operations[backend][operation] = function
    _chosen.clear()


def forget(operation):
    """Takes an operation out of every backend."""
    for operations in _operations.values():
        operations.pop(operation, None)
    _chosen.clear()


def implement_lazily(backend, operation, module):
    """Adds an operation that `module`, imported when the backend is first chosen, implements."""
    _modules[backend, operation] = module


@constant_while_traced
def _load(backend):
    """All of a backend's operations at once: while torch.compile traces, it sees what they are loaded into only as it
    was the first time."""
    for (name, operation), module in _modules.items():
        if name == backend and operation not in _operations[backend]:
            importlib.import_module(module)


_warned = False


@constant_while_traced  # said then, not by the graph
def _warn_once(backend):
    """Without the extension something slower runs: said the first time, not with every call."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"mmkernels runs {backend!r} instead of its C++ and CUDA kernels: {extension_error}",
            RuntimeWarning,
            stacklevel=5,
        )


def _function(backend, operation):
    _load(backend)
    return _operations[backend][operation]


# What isn't to be run though it is there: (backend, operation, dtype) -> the reason.
REFUSED = {
    ("cuda", "absorbed_attention", torch.float32): "on the GPU that ran them, an H200, its float32 kernels went out of "
    "bounds; 16-bit ones are right"
}
# Right, but measured far slower than what comes next: never chosen by itself.
ONLY_WHEN_ASKED = {("triton", "absorbed_attention", torch.float32)}


def why_not(backend, operation, device_type, dtype):
    """None where `backend` can run `operation`, else the reason."""
    reason = _reasons[backend](device_type, dtype) or REFUSED.get((backend, operation, dtype))
    if reason is None and (backend, operation) not in _modules and operation not in _operations[backend]:
        reason = f"it has no {operation}"
    return reason


def names():
    """Every registered backend, fastest first."""
    return [*(name for name in ORDER if name in _reasons), *(name for name in _reasons if name not in ORDER)]


def check(backend):
    """Raises where `backend` is neither None nor a backend's name."""
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
    if backend not in _reasons:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, names()))}, got {backend!r}")


def choose(operation, tensor, backend=None):
    """What runs `operation` on `tensor`'s device and dtype."""
    if torch.compiler.is_compiling() or not (backend is None or isinstance(backend, str)):
        return _choose(operation, tensor.device.type, tensor.dtype, backend)
    key = operation, tensor.device, tensor.dtype, backend
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(operation, tensor.device.type, tensor.dtype, backend)
    return chosen


def _choose(operation, device_type, dtype, backend):
    if backend is None:
        for name in ORDER:
            if (name, device_type) == ("triton", "cpu") or (name, operation, dtype) in ONLY_WHEN_ASKED:
                continue
            if name in _reasons and why_not(name, operation, device_type, dtype) is None:
                if extension is None:
                    _warn_once(name)
                return _function(name, operation)
    else:
        check(backend)
        if why_not(backend, operation, device_type, dtype) is None:
            return _function(backend, operation)
    reasons = "".join(f"\n  {name}: {why_not(name, operation, device_type, dtype) or 'can run'}" for name in names())
    raise BackendError(f"backend {backend!r} can't run {operation} for {dtype} on {device_type}:{reasons}")


def _cpu(device_type, dtype):
    if extension is None:
        return extension_error
    if device_type not in ("cpu", "meta"):
        return f"the tensors are on {device_type}, not on the CPU"
    return None


def _cuda(device_type, dtype):
    if extension is None:
        return extension_error
    if not extension.cuda_architectures:
        return f"the CUDA kernels were not built: {extension.cuda_reason}"
    if device_type != "cuda":
        return f"the tensors are on {device_type}, not on a CUDA device"
    if dtype == torch.float64:
        return "it has no float64"
    return None


_triton_installed = importlib.util.find_spec("triton") is not None


def _triton(device_type, dtype):
    if not _triton_installed:
        return "triton is not installed: pip install mmkernels[triton]"
    if device_type == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU; there its interpreter runs, with TRITON_INTERPRET=1 set at the start"
    if device_type not in ("cpu", "cuda"):
        return f"the tensors are on {device_type}, not on a CUDA or ROCm device"
    if dtype == torch.float64:
        return "it has no float64"
    return None


register("cuda", _cuda)
register("triton", _triton)
register("cpu", _cpu)
register("reference", lambda device_type, dtype: None)
