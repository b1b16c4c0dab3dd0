"""What the operations take beyond the plain types, and what a mask of two dimensions means."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.attention_tests import draw
from support.mistakes import BAGS
from support.runnable import runnable
from test_errors import FORMS, OPERATIONS

import mmkernels as mmk
from mmkernels import reference

PACKED = [name for name, operation in OPERATIONS.items() if "packed" in operation.FORMS]
SEQUENCES = {
    "list": BAGS.tolist(),
    "tuple": tuple(BAGS.tolist()),
    "of NumPy's": [np.int64(b) for b in BAGS.tolist()],
    "array": BAGS.numpy(),
    "array of int32": BAGS.int().numpy(),
    "read-only array": np.broadcast_to(BAGS.numpy(), 4),
}


def results(found):
    return found if isinstance(found, tuple) else (found,)


def assert_same(found, expected):
    found = results(found)
    expected = results(expected)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.property("numbers, flags and offsets of other types")
@pytest.mark.parametrize("operation, form", FORMS)
def test_numbers_and_flags_of_numpy(operation, form):
    """Each option that a plain number or flag is, as NumPy has it: the same bits."""
    function = getattr(mmk, operation)
    for name, parameter in inspect.signature(function).parameters.items():
        values = {
            "scale": (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2)),
            "num_heads": (np.int64(2), np.int32(2)),
        }.get(name, (np.bool_(True), np.bool_(False)) if isinstance(parameter.default, bool) else ())
        for value in values:
            assert_same(function(**form.arguments | {name: value}), function(**form.arguments | {name: value.item()}))


def test_numbers_and_flags_of_numpy_in_modules():
    """They are Python's then: what a module's attributes say, and what is traced."""
    module = mmk.SpatialAttention(
        np.int64(8),
        np.int32(5),
        num_heads=np.int64(2),
        rescale=np.bool_(True),
        bias=np.bool_(False),
        scale=np.float32(0.5),
    )
    assert [type(value) for value in (module.image_dim, module.text_dim, module.num_heads, module.rescale)] == [
        int,
        int,
        int,
        bool,
    ]
    assert module.text_projection.bias is None
    tensors = draw(2, 6, 8), draw(2, 5)
    torch._dynamo.reset()
    assert_same(torch.compile(module, fullgraph=True, backend="eager")(*tensors), module(*tensors))
    assert mmk.AdditiveAttention(np.int64(8), np.int64(4), gated=np.bool_(True)).gate_projection is not None


@pytest.mark.property("numbers, flags and offsets of other types")
@pytest.mark.parametrize("operation", PACKED)
@pytest.mark.parametrize("offsets", SEQUENCES.values(), ids=SEQUENCES)
def test_offsets_of_any_sequence(operation, offsets):
    arguments = OPERATIONS[operation].FORMS["packed"].arguments
    for function in (getattr(mmk, operation), getattr(reference, operation)):
        expected = function(**arguments)
        assert_same(function(**arguments | {"offsets": offsets}), expected)


@pytest.mark.property("numbers, flags and offsets of other types", "compile")
@pytest.mark.parametrize("operation", PACKED)
@pytest.mark.parametrize(
    "offsets", [SEQUENCES[kind] for kind in ("list", "tuple", "array")], ids=["list", "tuple", "array"]
)
def test_compiled_with_offsets_of_any_sequence(operation, offsets):
    arguments = OPERATIONS[operation].FORMS["packed"].arguments
    function = getattr(mmk, operation)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given, offsets: function(**given | {"offsets": offsets}), fullgraph=True, backend="eager"
    )
    assert_same(compiled(arguments, offsets), function(**arguments))


@pytest.mark.parametrize("operation", PACKED)
def test_offsets_go_where_image_is(operation):
    """A list has no device of its own."""
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in OPERATIONS[operation].FORMS["packed"].arguments.items()
    }
    assert results(getattr(mmk, operation)(**arguments | {"offsets": BAGS.tolist()}))[0].device.type == "meta"


def test_without_numpy():
    """Nothing imports it, lists of offsets and torch.compile don't either."""
    program = """
import sys
sys.modules["numpy"] = None               # an import fails
import torch
import mmkernels as mmk
image, text = torch.randn(6, 8), torch.randn(2, 8)
call = lambda image, text: mmk.spatial_attention(image, text, offsets=[0, 2, 6], num_heads=2, rescale=True)
found = call(image, text)
assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(image, text), found)
mmk.AdditiveAttention(8, 4)(image, offsets=[0, 2, 6])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("backend, device, dtype", runnable("gated_cross_attention"))
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_two_dimensional_mask_is_of_samples_and_tokens(backend, device, dtype, kind):
    """Also where there are as many samples as positions."""
    query, key, value = (draw(3, 2, n, 4, device=device, seed=n) for n in (3, 5, 5))
    mask = draw(3, 5, device=device, seed=9)
    mask = mask > 0 if kind == "bool" else mask
    run = lambda mask: mmk.gated_cross_attention(query, key, value, attn_mask=mask, need_weights=True, backend=backend)
    assert_same(run(mask), run(mask[:, None, None]))
    assert not torch.equal(run(mask)[0], run(mask[None, None])[0])
    assert_same(run(mask[:1]), run(mask[:1, None, None]))
