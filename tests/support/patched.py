"""What every module of another package has to show when it is patched."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mmkernels
from support.attention_tests import assert_rule, draw, outputs


def with_gradients(call, module, tensors):
    """What ``call(module, *tensors)`` gives, and the gradients of tensors and parameters that aren't frozen; 0 where
    there is none."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = call(module, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    upstream = upstream_of(results)
    wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(results, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in results), *grads]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(expected), strict=True))


def upstream_of(results):
    """Gradients that flow in. Rounded once: the truth gets the same."""
    return [draw(*r.shape, seed=9 + i).to(torch.bfloat16).to(r.dtype) for i, r in enumerate(results)]


def assert_watched_parts_are_called(call, module, tensors, replaced=""):
    """Who hooks a part of what was replaced sees the calls that he would see unpatched, no more and no fewer; under
    autocast, too, which decides itself what is rounded when."""
    original = copy.deepcopy(module)
    mmkernels.unpatch(original)
    within = f"{replaced}." if replaced else ""
    parts = [name for name, _ in module.named_modules() if name != replaced and name.startswith(within)]
    for autocast in (False, True):
        for name in parts:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert calls_of(name, call, module, tensors) == calls_of(name, call, original, tensors), name


def calls_of(name, call, module, tensors):
    """Of a part by its name: shapes of what each call took and gave."""
    seen = []

    def hook(part, given, named, result):
        leaves = tree_leaves((given, named, result))
        seen.append([t.shape for t in leaves if isinstance(t, torch.Tensor)])

    handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    call(module, *tensors)
    handle.remove()
    return seen


def assert_patched(call, module, tensors, operation, name=""):
    """A patched module, of which the part of this name is replaced, is right beside itself in float64 and as it was,
    and it comes back."""
    dtype = tensors[0].dtype
    module.to(dtype)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    truth = with_gradients(call, copy.deepcopy(module).double(), wide)
    plain = with_gradients(call, module, tensors)
    state = module.state_dict()
    assert mmkernels.patch(module).replaced == [name]
    assert mmkernels.patch(module, dry_run=True).rows[0].operation == operation
    assert_rule(with_gradients(call, module, tensors), truth, plain)
    assert_watched_parts_are_called(call, module, tensors, name)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    mmkernels.unpatch(module)
    left = {attribute for part in module.modules() for attribute in part.__dict__}
    assert not [attribute for attribute in left if "mmkernels" in attribute or attribute == "forward"]
    assert_equal(with_gradients(call, module, tensors), plain)


class Called(nn.Module):
    """A call, as a module of its own."""

    def __init__(self, call, module):
        super().__init__()
        self.call = call
        self.module = module

    def forward(self, *tensors):
        return self.call(self.module, *tensors)


def assert_same_in_onnx(call, module, tensors):
    """The graph of a patched module is the one that it has unpatched."""
    onnx = pytest.importorskip("onnx")
    graphs = []
    for change in (mmkernels.unpatch, mmkernels.patch):
        change(module)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Called(call, module).eval(), tuple(tensors), file, dynamo=False)
        nodes = onnx.load_from_string(file.getvalue()).graph.node
        attributes = [[attribute.SerializeToString() for attribute in node.attribute] for node in nodes]
        graphs.append([(node.domain, node.op_type, *each) for node, each in zip(nodes, attributes)])
    assert graphs[0] and graphs[0] == graphs[1]
