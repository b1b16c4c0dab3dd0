"""An operation's schema stands in one place: what C++ and Triton register is what follows from it."""

import importlib

import pytest
import torch

from mmkernels import backends, functional
from mmkernels.ops.schema import Schema

SUFFIXES = {"forward": "", "into": "_out", "backward": "_backward"}


@pytest.mark.parametrize("name", functional.__all__)
@pytest.mark.skipif(backends.extension is None, reason="the extension is not built")
def test_cpp_registers_what_follows(name):
    schema = importlib.import_module(f"mmkernels.ops.{name}").OPERATION.schema
    registered = {
        kind: str(getattr(torch.ops.mmkernels, name + suffix).default._schema)
        for kind, suffix in SUFFIXES.items()
        if hasattr(torch.ops.mmkernels, name + suffix)
    }
    assert {"forward", "backward"} <= registered.keys()
    assert registered == {kind: f"mmkernels::{getattr(schema, kind)(name)}" for kind in registered}


def test_everything_follows():
    schema = Schema("(Tensor a, Tensor? b, float c) -> (Tensor result, Tensor extra)", ("b",), ("extra",), ("extra",))
    assert (schema.inputs, schema.options, schema.outputs) == (("a", "b"), ("c",), ("result",))
    assert schema.forward("f") == "f(Tensor a, Tensor? b, float c) -> (Tensor, Tensor)"
    assert schema.into("f") == "f_out(Tensor a, Tensor? b, float c, Tensor(a!) out) -> Tensor"
    assert schema.backward("f") == (
        "f_backward(Tensor? grad_result, Tensor a, Tensor? b, Tensor extra, float c, bool need_b_grad) -> Tensor"
    )
    call = schema.backward_call(("grad", "a", "b", "extra", 1.0, True))
    assert (call.output_grads.result, call.inputs.b, call.kept.extra, call.options.c) == ("grad", "b", "extra", 1.0)
    assert call.needs.b is True


@pytest.mark.parametrize(
    "schema, differentiable, extras, message",
    [
        ("(float c, Tensor a) -> (Tensor result)", (), (), "tensors come before options"),
        ("(Tensor a) -> (Tensor extra, Tensor result)", (), ("extra",), "must be the last"),
        ("(Tensor a) -> (Tensor result)", ("b",), (), "must be among the tensors"),
    ],
)
def test_what_a_schema_must_be(schema, differentiable, extras, message):
    with pytest.raises(ValueError, match=message):
        Schema(schema, differentiable, extras, ())
