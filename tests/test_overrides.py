"""What overrides PyTorch's functions sees the registered operations, also where nothing else would ask for them."""

import pytest
import torch
from support.calls import MAIN, VARIANTS, function_of, tensors_of
from torch.overrides import TorchFunctionMode

import mmkernels as mmk

OPERATIONS = [name for name in MAIN if "packed" not in name]


def operation_of(name):
    return VARIANTS[name].operation


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Labelled(torch.Tensor):
    """A subclass without rules of its own: results are Labelled, too."""


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_modes_see_the_operation(name, training):
    tensors = [t.requires_grad_(training) if t.is_floating_point() else t for t in tensors_of(name, torch.float32)]
    with Recorder() as recorder:
        function_of(name, mmk, "cpu", backend="cpu")(*tensors)
    assert any(f"mmkernels.{operation_of(name)}" in seen for seen in recorder.seen)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_subclasses_come_back(name, training):
    tensors = [t.as_subclass(Labelled) for t in tensors_of(name, torch.float32)]
    tensors = [t.requires_grad_(training) if t.is_floating_point() else t for t in tensors]
    results = function_of(name, mmk, "cpu", backend="cpu")(*tensors)
    for result in results if isinstance(results, tuple) else (results,):
        assert isinstance(result, Labelled)
        assert result.requires_grad == training
