"""The variants of all operations (tests/operations), as parameters of tests and as functions of their tensors."""

import importlib

import pytest
import torch

from mmkernels import cases, functional, reference

from .attention_tests import draw
from .runnable import runnable

VARIANTS = {
    name: variant
    for operation in functional.__all__
    for name, variant in importlib.import_module(f"operations.{operation}").VARIANTS.items()
}
MAIN = [name for name, variant in VARIANTS.items() if variant.main]


def parameters(names=VARIANTS, dtypes=(torch.float32,), slow=VARIANTS):
    """(backend, device, dtype, variant) of everything that can run here; of `slow` variants alone where a backend is
    executed for correctness alone."""
    return [
        pytest.param(*combination.values, name, id=f"{name}-{combination.id}")
        for name in names
        for combination in runnable(VARIANTS[name].operation, dtypes)
        if name in slow or not cases.is_slow(*combination.values[:2])
    ]


def tensors_of(name, dtype=torch.float64, device="cpu", seed=0, **sizes):
    shapes, _ = VARIANTS[name].of(**sizes)
    return tuple(draw(*shape, dtype=dtype, device=device, seed=seed + i) for i, shape in enumerate(shapes.values()))


def function_of(name, module=reference, device="cpu", sizes=None, **changes):
    """The call as a function of its tensors, which gives a tuple; other options and the backend come with `changes`."""
    shapes, options = VARIANTS[name].of(**sizes or {})
    options |= changes
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    function = getattr(module, VARIANTS[name].operation)

    def run(*tensors):
        results = function(**dict(zip(shapes, tensors)), **options)
        return results if isinstance(results, tuple) else (results,)

    return run
