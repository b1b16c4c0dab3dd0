"""What PyTorch's counter of floating point operations, ``torch.utils.flop_counter.FlopCounterMode``, counts of ours.

It knows PyTorch's own operations; others count as none. Ours count as their definitions in plain PyTorch do, forward
and backward, so that a model has the same number with and without them. What a kernel computes a second time in its
backward pass isn't counted: the definition keeps it.
"""

import functools
import importlib.abc
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .. import torch_private

COUNTER = "torch.utils.flop_counter"
_formulas = {}


def register(operation, plain, before=None):
    """A registered operation counts as `plain` does for the same arguments, less what `before` does."""

    def formula(*arguments, out_val=None):
        described = tuple(map(_described, arguments))
        return _counted(plain, described) - (0 if before is None else _counted(before, described))

    _formulas[operation.overloadpacket] = formula
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER], operation.overloadpacket)


class _AfterItsImport(importlib.abc.MetaPathFinder):
    """Tells the counter our formulas when it is imported. Importing it for them would take longer than all of this
    package, and bring Triton."""

    def find_spec(self, name, path, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(COUNTER)
        execute = spec.loader.exec_module

        def execute_and_tell(module):
            execute(module)
            _tell(module, *_formulas)

        spec.loader.exec_module = execute_and_tell
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterItsImport())


def _tell(counter, *packets):
    """Those that count already have a table of their own: a backend may be loaded by the first call that is counted."""
    for packet in packets:
        counter.register_flop_formula(packet, get_raw=True)(_formulas[packet])
    for mode in torch_private.dispatch_modes():
        if isinstance(getattr(mode, "counter", None), counter.FlopCounterMode):
            mode.counter.flop_registry.update((packet, _formulas[packet]) for packet in packets)


class _Like(NamedTuple):
    shape: tuple
    dtype: torch.dtype

    def tensor(self):
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _described(argument):
    if isinstance(argument, torch.Tensor):
        return _Like(tuple(map(int, argument.shape)), argument.dtype)
    return tuple(map(_described, argument)) if isinstance(argument, (list, tuple)) else argument


@functools.lru_cache(maxsize=4096)
def _counted(function, described):
    """In a thread of its own: here, amid an operation, PyTorch's modes are on and autograd is off."""

    def count():
        with sys.modules[COUNTER].FlopCounterMode(display=False) as counter:
            function(*(d.tensor() if isinstance(d, _Like) else d for d in described))
        return counter.get_total_flops()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(count).result()
