"""Whole models of transformers, patched: the calls that their layers really make, outputs, weights, gradients."""

import pytest
import torch
from support.attention_tests import assert_rule
from support.patched import assert_equal

import mmkernels

pytest.importorskip("transformers")

from support.transformers_models import MODELS, build, run, trained, truths


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=["", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, options):
    """What its layers really ask for; weights as before."""
    model, inputs = build(name)
    truth, rounded = truths(model, inputs, **options)
    before = run(model, inputs, **options)
    report = mmkernels.patch(model)
    assert {row.operation for row in report.rows if row.operation} == MODELS[name][1]
    found = run(model, inputs, **options)
    assert_rule(found, truth, before, rounded=rounded)
    assert not all(map(torch.equal, found, before))  # boxes far outside of a picture would sample nothing
    mmkernels.unpatch(model)
    assert_equal(run(model, inputs, **options), before)


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_are_trained(name):
    """Data-parallel training waits for a gradient of each."""
    model, inputs = build(name)
    before = trained(model, inputs)
    mmkernels.patch(model)
    assert trained(model, inputs) == before
