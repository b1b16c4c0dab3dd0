"""What every module of another package has to show when it is patched."""

import copy

import torch

import mmkernels
from support.attention_tests import assert_rule, draw, outputs


def with_gradients(call, module, tensors):
    """What ``call(module, *tensors)`` gives, and the gradients of tensors and parameters; 0 where there is none."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = call(module, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    upstream = upstream_of(results)
    wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *module.parameters()]
    grads = torch.autograd.grad(results, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in results), *grads]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(expected), strict=True))


def upstream_of(results):
    """Gradients that flow in. Rounded once: the truth gets the same."""
    return [draw(*r.shape, seed=9 + i).to(torch.bfloat16).to(r.dtype) for i, r in enumerate(results)]


def assert_patched(call, module, tensors, operation):
    """A patched module is right beside itself in float64 and as it was, and it comes back."""
    dtype = tensors[0].dtype
    module.to(dtype)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    truth = with_gradients(call, copy.deepcopy(module).double(), wide)
    plain = with_gradients(call, module, tensors)
    state = module.state_dict()
    assert mmkernels.patch(module).replaced == [""]
    assert mmkernels.patch(module, dry_run=True).rows[0].operation == operation
    assert_rule(with_gradients(call, module, tensors), truth, plain)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    mmkernels.unpatch(module)
    assert not [name for name in module.__dict__ if "mmkernels" in name or name == "forward"]
    assert_equal(with_gradients(call, module, tensors), plain)
