"""Adapters of peft in patched models: what they were given in is called, and they are trained."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule, draw
from support.patched import assert_equal, assert_patched, with_gradients

import mmkernels

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from support import transformers_modules as tiny
from support.transformers_models import build, run, trained, truths


def with_adapters(module, targets, **options):
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return tiny.randomised(peft.inject_adapter_in_model(config, module))


def pooling_head():
    config = tiny.source("vjepa2").VJEPA2Config(hidden_size=16, num_attention_heads=2, attn_implementation="sdpa")
    return tiny.randomised(tiny.source("vjepa2").VJEPA2PoolerCrossAttention(config))


POOL = lambda module, query, image: module(query, image, image)[0]
POOLED = draw(2, 1, 16), draw(2, 40, 16, seed=1)
# (module, how it is called, tensors, operation, name of what is replaced)
LAYERS = {
    "deformable": (
        lambda: tiny.deformable("deformable_detr"),
        lambda module, *tensors: tiny.call_deformable("deformable_detr", module, *tensors)[0],
        tiny.deformable_tensors("deformable_detr", 4),
        "deformable_attention",
        "",
    ),
    "fusion": (
        lambda: tiny.fusion("grounding_dino"),
        tiny.call_fusion,
        tiny.fusion_tensors(),
        "bidirectional_attention",
        "attn",
    ),
    "pooling": (pooling_head, POOL, POOLED, "absorbed_attention", ""),
}
TARGETS = [
    ("deformable", ["value_proj", "attention_weights", "sampling_offsets", "output_proj"]),
    ("fusion", ["text_proj", "values_text_proj", "out_text_proj"]),
    ("fusion", ["vision_proj", "values_vision_proj", "out_vision_proj"]),
    ("pooling", ["q_proj"]),
]


@pytest.mark.parametrize("layer, targets", TARGETS)
def test_layer(layer, targets):
    """Given before patching, and after: what is frozen stays so."""
    make, call, tensors, operation, name = LAYERS[layer]
    adapted = with_adapters(make(), targets)
    assert_patched(call, adapted, tensors, operation, name)
    frozen = {name for name, parameter in adapted.named_parameters() if not parameter.requires_grad}
    assert frozen and not any("lora" in name for name in frozen)
    module = make()
    mmkernels.patch(module)
    with_adapters(module, targets)
    mmkernels.patch(adapted)
    assert_equal(with_gradients(call, module, tensors), with_gradients(call, adapted, tensors))


def test_dropout_is_drawn_once():
    """Where the values' projection has to be called, nothing is fused: the same numbers as before."""
    module = with_adapters(pooling_head(), ["q_proj", "v_proj"], lora_dropout=0.5)
    original = copy.deepcopy(module).train()
    mmkernels.patch(module)
    results = []
    for each in (original, module.train()):
        torch.manual_seed(0)
        results.append(with_gradients(POOL, each, POOLED))
    assert_equal(*results)


def test_a_learned_query_is_dropped_for_each_sample():
    """As in plain PyTorch, which projects it for each."""
    config = tiny.source("videoprism").VideoPrismVisionConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, attn_implementation="sdpa"
    )
    module = tiny.randomised(tiny.source("videoprism").VideoPrismMultiheadAttentionPoolingHead(config))
    with_adapters(module, ["q_proj"], lora_dropout=0.5).train()
    mmkernels.patch(module)
    same = draw(1, 40, 16).expand(8, -1, -1)
    torch.manual_seed(0)
    found = module(same)[0]
    assert not all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("patch_first", [True, False])
def test_model(patch_first):
    """A whole model as users adapt it: the same is trained as unpatched, and merged it is fused again."""
    model, inputs = build("mask2former")
    if patch_first:
        mmkernels.patch(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*\.(value_proj|attention_weights)"))
    tiny.randomised(adapted)
    if not patch_first:
        mmkernels.patch(adapted)
    names = trained(adapted, inputs)
    assert names and all("lora" in name for name in names)
    found = run(adapted, inputs)
    mmkernels.unpatch(adapted)
    assert trained(adapted, inputs) == names
    truth, rounded = truths(adapted, inputs)
    assert_rule(found, truth, run(adapted, inputs), rounded=rounded)
    merged = adapted.merge_and_unload()
    truth, rounded = truths(merged, inputs)
    before = run(merged, inputs)
    assert "deformable_attention" in {row.operation for row in mmkernels.patch(merged).rows}
    assert_rule(run(merged, inputs), truth, before, rounded=rounded)
