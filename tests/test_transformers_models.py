"""Whole models of transformers, patched: the calls that their layers really make, outputs, weights, gradients."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule
from support.patched import assert_equal, upstream_of
from torch import nn

import mmkernels
from mmkernels import tolerance

pytest.importorskip("transformers")

from support.transformers_models import MODELS, build


def tensors(found):
    """Every tensor of an output, nested as it may be."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def run(model, inputs, **options):
    with torch.no_grad():
        return tensors(model(**inputs, **options))


def with_gradients(model, inputs):
    """Names of parameters that get a gradient."""
    model.zero_grad()
    found = [t for t in tensors(model(**inputs)) if t.requires_grad]
    torch.autograd.backward(found, upstream_of(found))
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def truths(model, inputs, **options):
    """In float64: as it is, and with parameters and picture half an epsilon off."""
    for change in (torch.Tensor.double, tolerance.half_an_epsilon_off):
        wide = copy.deepcopy(model)
        for part in wide.modules():
            for name, parameter in part._parameters.items():
                part._parameters[name] = parameter if parameter is None else nn.Parameter(change(parameter.detach()))
        wide.double()
        yield run(wide, {k: change(v) if v.is_floating_point() else v for k, v in inputs.items()}, **options)


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=["", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, options):
    """What its layers really ask for; weights as before."""
    model, inputs = build(name)
    truth, rounded = truths(model, inputs, **options)
    before = run(model, inputs, **options)
    report = mmkernels.patch(model)
    assert {row.operation for row in report.rows if row.operation} == MODELS[name][1]
    assert_rule(run(model, inputs, **options), truth, before, rounded=rounded)
    mmkernels.unpatch(model)
    assert_equal(run(model, inputs, **options), before)


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_are_trained(name):
    """Data-parallel training waits for a gradient of each."""
    model, inputs = build(name)
    before = with_gradients(model, inputs)
    mmkernels.patch(model)
    assert with_gradients(model, inputs) == before
