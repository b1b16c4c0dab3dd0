"""Patched models whose parameters accelerate keeps elsewhere and brings when a module is called."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule
from support.patched import assert_equal

import mmkernels
from mmkernels import functional

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import accelerate
from support import transformers_modules as tiny
from support.transformers_models import build, run, truths


@pytest.mark.parametrize("patch_first", [True, False])
def test_dispatched(patch_first, tmp_path, monkeypatch):
    """Encoder and decoder lie on the disk. What was patched before is fused; afterwards nothing is, and it is told."""
    model, inputs = build("grounding_dino")
    truth, rounded = truths(model, inputs)
    before = run(model, inputs)
    if patch_first:
        assert len(mmkernels.patch(model)) == 4
    blocks = {".".join(name.split(".")[:2]) for name in model.state_dict()}
    places = {block: "disk" if block in ("model.encoder", "model.decoder") else "cpu" for block in blocks}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if not patch_first:
        report = mmkernels.patch(model)
        assert not report.replaced
        assert "its forward was replaced by somebody else" in report.left_alone.values()
    calls = []
    for name in ("deformable_attention", "bidirectional_attention"):
        operation = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, f=operation, n=name, **b: calls.append(n) or f(*a, **b))
    assert_rule(run(model, inputs), truth, before, rounded=rounded)
    assert len(calls) == (4 if patch_first else 0)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert len(mmkernels.patch(model)) == 4
    calls.clear()
    assert_rule(run(model, inputs), truth, before, rounded=rounded)
    assert len(calls) == 4
    mmkernels.unpatch(model)
    assert_equal(run(model, inputs), before)


def test_offloaded():
    """What reads a projection's weight finds it elsewhere: the plain way calls it."""
    config = tiny.source("blip_2").Blip2QFormerConfig(
        encoder_hidden_size=20, hidden_size=16, num_attention_heads=2, attn_implementation="sdpa"
    )
    module = tiny.randomised(tiny.source("blip_2").Blip2QFormerMultiHeadAttention(config, is_cross_attention=True))
    queries, image = tiny.draw(2, 3, 16), tiny.draw(2, 40, 20, seed=1)
    with torch.no_grad():
        before = module(queries, encoder_hidden_states=image)[0]
        mmkernels.patch(module)
        fused = module(queries, encoder_hidden_states=image)[0]
        assert not torch.equal(fused, before)
        offloaded = accelerate.cpu_offload(copy.deepcopy(module), torch.device("cpu"))
        assert offloaded.key.weight.is_meta
        assert torch.equal(offloaded(queries, encoder_hidden_states=image)[0], before)
        accelerate.hooks.remove_hook_from_module(offloaded, recurse=True)
        assert torch.equal(offloaded(queries, encoder_hidden_states=image)[0], fused)
