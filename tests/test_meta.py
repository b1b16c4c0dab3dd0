"""Without data: on meta and fake tensors every operation and module gives what the real one gives, in shape, dtype and
strides."""

import functools

import pytest
import torch
from support import interpreter
from support.attention_tests import draw
from support.runnable import runnable
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import mmkernels as mmk
from mmkernels import backends, cases

OPERATIONS = mmk.functional.__all__


# In bfloat16 results and sums differ in dtype.
on_every_backend = pytest.mark.parametrize(
    "operation, backend, device, dtype",
    [
        pytest.param(operation, *combination.values, id=f"{operation}-{combination.id}")
        for operation in OPERATIONS
        for combination in runnable(operation, [torch.bfloat16])
    ],
)


def kind(results):
    """Strides that lead somewhere."""
    return [
        (t.shape, t.dtype, [s for n, s in zip(t.shape, t.stride()) if n > 1] if t.numel() else [])
        for t in tree_leaves(results)
        if isinstance(t, torch.Tensor)
    ]


def moved(values, move):
    """The same tensors elsewhere: as they lie, and with what requires a gradient."""
    return tree_map(
        lambda v: move(v.detach()).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v, values
    )


def computed(function, arguments):
    """The results, and the gradients of their sum."""
    results = [r for r in tree_leaves(function(**arguments)) if r is not None]
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return results, torch.autograd.grad([r.sum() for r in results], leaves, allow_unused=True)


def with_gradients(arguments):
    return {
        name: v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in arguments.items()
    }


@functools.cache
def computed_on_all(operation, backend, device, dtype):
    """(case, kind of what is computed) of every small case there is: all options, masks, layouts, packed bags, nothing
    at all."""
    function = functools.partial(getattr(mmk, operation), backend=backend)
    with interpreter.launching_nothing():
        return [
            (case, kind(computed(function, with_gradients(case.build(dtype, device)))))
            for case in cases.selected(operation, small=True)
        ]


@pytest.mark.property("meta and fake")
@pytest.mark.parametrize("where", ["meta", "fake"])  # one after the other, of the same results
@on_every_backend
def test_operations(operation, backend, device, dtype, where):
    if where == "meta" and backends.why_not(backend, operation, "meta", dtype) is not None:
        pytest.skip("not on meta tensors")
    function = functools.partial(getattr(mmk, operation), backend=backend)
    mode = FakeTensorMode()
    wrong = []
    for case, expected in computed_on_all(operation, backend, device, dtype):
        arguments = with_gradients(case.build(dtype, device))
        if where == "meta":
            found = computed(function, moved(arguments, lambda t: t.to("meta")))
        else:
            arguments = moved(arguments, mode.from_tensor)
            with mode:
                found = computed(function, arguments)
        if kind(found) != expected:
            wrong.append((case.name, kind(found), expected))
    assert not wrong, wrong[0]


# name, inputs' shapes, what makes it
MODULES = {
    "spatial": (mmk.SpatialAttention, (6, 5), {}, [(2, 4, 6), (2, 5)]),
    "channel": (mmk.ChannelAttention, (6, 5), {}, [(2, 4, 6), (2, 5)]),
    "gated": (mmk.GatedCrossAttention, (6, 5), {"num_heads": 2}, [(2, 4, 6), (2, 3, 5)]),
    "bidirectional": (mmk.BidirectionalAttention, (6, 5, 8, 2), {}, [(2, 4, 6), (2, 3, 5)]),
    "additive": (mmk.AdditiveAttention, (6, 7, 5, 2), {"gated": True}, [(2, 4, 6), (2, 5)]),
    "pooling": (mmk.AttentionPooling, (6, 2, 3), {}, [(2, 4, 6)]),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("need_weights", [False, True])
def test_modules(name, need_weights):
    """Built without memory, run without data, then given real parameters."""
    make, arguments, options, shapes = MODULES[name]
    call = {} if name in ("bidirectional", "pooling") else {"need_weights": need_weights}
    with torch.device("meta"):
        module = make(*arguments, **options)
        inputs = [torch.empty(shape) for shape in shapes]
    found = module(*inputs, **call)
    assert all(t.is_meta for t in tree_leaves(found))
    sum(t.sum() for t in tree_leaves(found)).backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in module.parameters())
    assert kind(found) == kind(module.to_empty(device="cpu")(*(draw(*shape) for shape in shapes), **call))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast_elsewhere_changes_nothing(operation):
    """Meta tensors know no autocast, also where that of a device is on."""
    case = cases.selected(operation, small=True)[0]
    arguments = moved(case.build(torch.float32), lambda t: t.to("meta"))
    expected = getattr(mmk, operation)(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert kind(getattr(mmk, operation)(**arguments)) == kind(expected)
