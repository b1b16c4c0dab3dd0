"""Deformable attention's CUDA kernels: in every order of threads, more levels than a launch has room for, what they
move."""

import pytest
import torch
from support import emulated, gpu_deformable
from support.attention_tests import assert_right, deterministic, draw

import mmkernels as mmk
from mmkernels import cases
from mmkernels.cases import deformable_attention as sampled

OPERATION = "deformable_attention"
BACKEND = "cuda-emulated"
pytestmark = pytest.mark.skipif(emulated.why_not_here() is not None, reason=str(emulated.why_not_here()))


def arguments_of(shape, dtype=torch.float32):
    return sampled.arguments(cases.Draw(dtype, "cpu", 0), shape, sampled.around)


@pytest.mark.property("same bits twice")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 40, 37, 3, ((5, 4), (2, 3))), (2, 1, 9, 20, 4, ((30, 41),))], ids=str)
def test_same_bits_in_any_order(dtype, shape):
    """Where algorithms have to be deterministic; atomics need not be."""
    given = arguments_of(shape, dtype)
    leaves = [given[name].requires_grad_() for name in ("value", "locations", "scores")]
    found = []
    for order in emulated.ORDERS:
        with deterministic(True), emulated.configured(order=order, processors=2):
            result = mmk.deformable_attention(**given, backend=BACKEND)
            found.append((result, *torch.autograd.grad(result.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("ordered", [False, True])
def test_many_levels(ordered):
    """40, of which a table in memory tells."""
    levels = tuple((1 + i % 3, 1 + i % 4) for i in range(40))
    case = cases.Case("40 levels", "any", lambda draws: arguments_of((1, 2, 8, 5, 2, levels), draws.dtype), True)
    with deterministic(ordered), emulated.configured(order="shuffled"):
        assert_right(OPERATION, case, torch.float32, "cpu", BACKEND)


@pytest.mark.parametrize("which, shape, launches, limit", gpu_deformable.LIMITS)
def test_what_it_moves(which, shape, launches, limit):
    """Everything once, and the rows at the corners of all points."""
    found = gpu_deformable.moved(which, *shape)
    minimum, rows = gpu_deformable.least(which, *shape), gpu_deformable.of_rows(which, *shape)
    assert found.launches == launches
    assert minimum < found.loaded + found.stored <= limit * (minimum + rows)


def test_the_only_position():
    """In its center the sample is the value, bit for bit."""
    value, locations = draw(1, 1, 3, 4), torch.full((1, 2, 3, 1, 1, 2), 0.5)
    found = mmk.deformable_attention(value, [(1, 1)], locations, torch.zeros(1, 2, 3, 1, 1), backend=BACKEND)
    assert torch.equal(found, value.flatten(2).expand(1, 2, 12))
