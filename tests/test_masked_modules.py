"""Modules with masks: what nothing takes part in is exactly 0, and what is masked out reaches nothing."""

import pytest
import torch
from support.attention_tests import assert_rule, draw
from test_absorb import KINDS, computed, inputs, made, on_every_kind


def masks_of(kind, change):
    return {name: change(mask) for name, mask in KINDS[kind][2].items()}


@on_every_kind
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_takes_part(extension, kind, absorb, dtype):
    """The attention's result is 0: out comes the last projections' bias, which alone has a gradient, or the norm's."""
    module = made(kind, dtype, absorb=absorb)
    found = computed(module, inputs(kind, dtype), **masks_of(kind, torch.zeros_like))
    last = [name for name in found if "out_projection.bias" in name]
    names = [name for name in found if name.startswith("result")]
    assert len(last) == len(names) == 1 + (kind == "bidirectional")
    for name, bias in zip(names, last):
        assert torch.equal(found[name], module.get_parameter(bias).expand_as(found[name])), name
    for name in found.keys() - {*last, *names, "norm.bias"}:
        assert not found[name].any(), name
    for i, bias in enumerate(last):
        upstream = draw(*found[names[i]].shape, seed=9 + i).bfloat16()
        assert_rule(found[bias], upstream.double().sum((0, 1)), upstream.to(dtype).sum((0, 1)))


@on_every_kind
@pytest.mark.parametrize("absorb", [True, False])
def test_one_sample_of_which_nothing_takes_part(extension, kind, absorb):
    """Beside others, whose numbers stay to the bit."""
    module, tensors = made(kind, absorb=absorb), inputs(kind)
    masks = masks_of(kind, lambda mask: mask.clone().index_fill_(0, torch.tensor(1), False))
    found = computed(module, tensors, **masks)
    for i in range(len(tensors)):
        assert not found[f"gradient {i}"][1].any()
    results = [name for name in found if name.startswith("result")]
    for name, bias in zip(results, [name for name in found if "out_projection.bias" in name]):
        assert torch.equal(found[name][1], module.get_parameter(bias).expand_as(found[name][1]))


@on_every_kind
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_masked_out_reaches_nothing(extension, kind, value, absorb):
    """Results and gradients, those of all parameters too, are those of 0 in its place, to the bit; its own is 0."""
    module, tensors = made(kind, absorb=absorb), inputs(kind)
    masks = KINDS[kind][2]
    parts = {0: masks.get("image_mask"), 1: masks.get("text_mask", masks.get("mask"))}
    hidden = lambda filled: [
        t if parts[i] is None else t.masked_fill(~parts[i][..., None], filled) for i, t in enumerate(tensors)
    ]
    clean, dirty = (computed(module, hidden(filled), **masks) for filled in (0, value))
    for i, part in parts.items():
        if part is not None:
            clean[f"gradient {i}"].masked_fill_(~part[..., None], 0)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    assert all(t.isfinite().all() for t in dirty.values())
