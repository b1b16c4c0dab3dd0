"""transformers' modules, patched: the same results and gradients, and back, bit for bit."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule, draw

import mmkernels

pytest.importorskip("transformers")

from support import transformers_modules as tiny  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DEFORMABLE = [(folder, n) for folder in (*tiny.DETR, *tiny.PADDING_MASK) for n in (2, 4)]
DEFORMABLE += [(folder, 4) for folder in tiny.UNEVEN]


def with_gradients(call, module, tensors):
    """What ``call(module, *tensors)`` gives, and the gradients of tensors and parameters; 0 where there is none."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = call(module, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    # Rounded once: the truth gets the same.
    upstream = [draw(*r.shape, seed=9 + i).to(torch.bfloat16).to(r.dtype) for i, r in enumerate(results)]
    wanted = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(results, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in results), *grads]


def assert_patched(call, module, tensors, operation):
    """A patched module is right beside itself in float64 and as it was, and it comes back."""
    dtype = tensors[0].dtype
    module.to(dtype)
    truth = with_gradients(call, copy.deepcopy(module).double(), [t.double() for t in tensors])
    plain = with_gradients(call, module, tensors)
    state = module.state_dict()
    assert mmkernels.patch(module).replaced == [""]
    assert mmkernels.patch(module, dry_run=True).rows[0].operation == operation
    assert_rule(with_gradients(call, module, tensors), truth, plain)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    mmkernels.unpatch(module)
    assert not [name for name in module.__dict__ if "mmkernels" in name or name == "forward"]
    again = with_gradients(call, module, tensors)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@in_both_dtypes
@pytest.mark.parametrize("folder, coordinates", DEFORMABLE)
def test_deformable(folder, coordinates, dtype):
    tensors = tiny.deformable_tensors(folder, coordinates, dtype)
    call = lambda module, *tensors: tiny.call_deformable(folder, module, *tensors)[0]
    assert_patched(call, tiny.deformable(folder), tensors, "deformable_attention")


@in_both_dtypes
@pytest.mark.parametrize("folder", tiny.FUSION)
def test_fusion(folder, dtype):
    assert_patched(tiny.call_fusion, tiny.fusion(folder), tiny.fusion_tensors(dtype), "bidirectional_attention")
