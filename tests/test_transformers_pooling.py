"""transformers' pooling heads, Q-Formers and the Perceiver, patched: their projections of the image absorbed."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule, draw
from support.patched import assert_equal, assert_patched, assert_same_in_onnx, with_gradients
from torch import nn

import mmkernels
from mmkernels import functional

pytest.importorskip("transformers")

from support.transformers_modules import randomised, source

N, WIDTH = 40, 16
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 24}
PART = torch.arange(2 * N).view(2, N) < N + 25


def head(folder, prefix, name="MultiheadAttentionPoolingHead", **options):
    config = getattr(source(folder), f"{prefix}Config")(**{**SIZES, **options}, attn_implementation="sdpa")
    return randomised(getattr(source(folder), prefix.removesuffix("Vision") + name)(config))


def perceiver():
    """One head, as its encoder has for pictures; 3 latents."""
    from transformers import PerceiverConfig

    module = source("perceiver").PerceiverSelfAttention(
        PerceiverConfig(), is_cross_attention=True, qk_channels=12, num_heads=1, q_dim=10, kv_dim=WIDTH
    )
    return randomised(module)


def qformer(folder, prefix):
    config = getattr(source(folder), f"{prefix}Config")(encoder_hidden_size=20, attn_implementation="sdpa", **SIZES)
    return randomised(getattr(source(folder), f"{prefix}MultiHeadAttention")(config, is_cross_attention=True))


def call_qformer(module, queries, image, **named):
    return module(queries, encoder_hidden_states=image, **named)[0]


IMAGE = [draw(2, N, WIDTH)]
QUERIES = [draw(2, 3, WIDTH, seed=1), draw(2, N, 20)]
# (module, how it is called, tensors, whether in bfloat16, too)
MODULES = {
    "siglip": (lambda: head("siglip", "SiglipVision"), lambda module, image: module(image), IMAGE, True),
    "siglip2": (lambda: head("siglip2", "Siglip2Vision"), lambda module, image: module(image, PART), IMAGE, True),
    "siglip2, no mask": (lambda: head("siglip2", "Siglip2Vision"), lambda module, image: module(image), IMAGE, True),
    "idefics2": (lambda: head("idefics2", "Idefics2Vision"), lambda module, image: module(image), IMAGE, True),
    "phi4_multimodal": (
        lambda: head("phi4_multimodal", "Phi4MultimodalVision", "VisionMultiheadAttentionPoolingHead"),
        lambda module, image: module(image, PART),
        IMAGE,
        True,
    ),
    "aimv2": (
        lambda: head("aimv2", "Aimv2Vision", "AttentionPoolingHead", qkv_bias=True),
        lambda module, image: module(image),
        IMAGE,
        True,
    ),
    "videoprism": (lambda: head("videoprism", "VideoPrismVision"), lambda module, image: module(image)[0], IMAGE, True),
    "vjepa2": (
        lambda: head("vjepa2", "VJEPA2", "PoolerCrossAttention"),
        lambda module, query, image: module(query, image, image)[0],
        [draw(2, 1, WIDTH, seed=1), *IMAGE],
        True,
    ),
    "blip_2": (lambda: qformer("blip_2", "Blip2QFormer"), call_qformer, QUERIES, False),
    "instructblip": (lambda: qformer("instructblip", "InstructBlipQFormer"), call_qformer, QUERIES, False),
    "instructblipvideo": (
        lambda: qformer("instructblipvideo", "InstructBlipVideoQFormer"),
        lambda *given: call_qformer(*given, encoder_attention_mask=PART[:, None, None]),
        QUERIES,
        False,
    ),
    "perceiver": (
        perceiver,
        lambda module, latents, inputs: module(latents, inputs=inputs)[0],
        [draw(2, 3, 10, seed=1), *IMAGE],
        False,
    ),
}
CASES = [(name, torch.float32) for name in MODULES] + [(n, torch.bfloat16) for n, (*_, low) in MODULES.items() if low]


@pytest.fixture
def absorbed(monkeypatch):
    """Calls of absorbed attention."""
    calls = []
    attend = functional.absorbed_attention
    monkeypatch.setattr(
        functional, "absorbed_attention", lambda *given, **named: calls.append(given) or attend(*given, **named)
    )
    return calls


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_module(name, dtype, absorbed):
    make, call, tensors, _ = MODULES[name]
    module, tensors = make(), [t.to(dtype) for t in tensors]
    assert_patched(call, module, tensors, "absorbed_attention")
    mmkernels.patch(module)
    absorbed.clear()
    call(module, *tensors)
    assert len(absorbed) == 1
    # The image itself, not a projection of it.
    assert absorbed[0][0].shape[1:] == tensors[-1].shape[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, (*_, low) in MODULES.items() if low])
def test_under_autocast(name, dtype, absorbed):
    """One query pools features of any dtype there, and gives the dtype that it gave."""
    make, call, tensors, _ = MODULES[name]
    module, tensors = make(), [t.to(dtype) for t in tensors]
    with torch.no_grad():
        truth = call(copy.deepcopy(module).double(), *(t.double() for t in tensors))
        with torch.autocast("cpu", torch.bfloat16):
            plain = call(module, *tensors)
            mmkernels.patch(module)
            found = call(module, *tensors)
    assert len(absorbed) == 1
    assert found.dtype == plain.dtype
    assert_rule(found, truth, plain)


def test_a_query_of_another_dtype_is_an_error():
    """As it was: scores of two dtypes."""
    module = head("vjepa2", "VJEPA2", "PoolerCrossAttention")
    module.q_proj = nn.Sequential(module.q_proj, ToBfloat16())
    query, image = MODULES["vjepa2"][2]
    for message in ("to have the same dtype", "the projected query must have the image's dtype torch.float32"):
        with pytest.raises((RuntimeError, ValueError), match=message):
            module(query, image, image)
        mmkernels.patch(module)


class ToBfloat16(nn.Module):
    def forward(self, features):
        return features.bfloat16()


def assert_plain(call, module, tensors, absorbed):
    """The patched module's own way, bit for bit."""
    plain = copy.deepcopy(module)
    assert mmkernels.unpatch(plain) == [""]
    results = []
    for each in (module, plain):
        torch.manual_seed(0)
        results.append(with_gradients(call, each, tensors))
    assert_equal(*results)
    assert not absorbed


@pytest.mark.parametrize("name", [name for name in MODULES if name != "aimv2"])  # it has none
def test_training_with_dropout(name, absorbed):
    make, call, tensors, _ = MODULES[name]
    module = make()
    mmkernels.patch(module)
    inner = getattr(module, "attention", module)
    for attribute in ("attention_dropout", "dropout"):
        if isinstance(getattr(inner, attribute, None), nn.Dropout):
            inner.dropout.p = 0.5
        elif hasattr(inner, attribute):
            setattr(inner, attribute, 0.5)
    assert_plain(call, module.train(), tensors, absorbed)


@pytest.mark.parametrize("name", ["siglip", "vjepa2", "blip_2", "perceiver"])
def test_hooked(name, absorbed):
    make, call, tensors, _ = MODULES[name]
    module = make()
    mmkernels.patch(module)
    inner = {"siglip": "attention", "vjepa2": "k_proj", "blip_2": "value", "perceiver": "key"}[name]
    seen = []
    handle = getattr(module, inner).register_forward_hook(lambda *call: seen.append(call))
    call(module, *tensors)
    assert len(seen) == 1 and not absorbed
    handle.remove()
    call(module, *tensors)
    assert len(absorbed) == 1


@pytest.mark.parametrize("name", ["blip_2", "perceiver"])
def test_16_bits_are_faster_with_projections(name, absorbed):
    make, call, tensors, _ = MODULES[name]
    module = make().bfloat16()
    mmkernels.patch(module)
    assert_plain(call, module, [t.bfloat16() for t in tensors], absorbed)


@pytest.mark.parametrize("name", ["siglip", "vjepa2"])
def test_onnx(name):
    make, call, tensors, _ = MODULES[name]
    assert_same_in_onnx(call, make(), tensors)


def test_masks_that_are_more_than_padding(absorbed):
    module = qformer("blip_2", "Blip2QFormer")
    mmkernels.patch(module)
    for mask in (draw(1, 1, 1, N), draw(2, 1, 3, N) > 0):
        assert_plain(lambda *given, m=mask: call_qformer(*given, encoder_attention_mask=m), module, QUERIES, absorbed)


def test_weights_that_are_asked_for(absorbed):
    module = perceiver()
    mmkernels.patch(module)
    latents, inputs = draw(2, 3, 10, seed=1), *IMAGE
    assert_plain(lambda m, *t: m(t[0], inputs=t[1], output_attentions=True), module, (latents, inputs), absorbed)
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(vocab_size=9, encoder_hidden_size=20, num_hidden_layers=1, **SIZES)
    model = randomised(Blip2QFormerModel(config))
    model.set_attn_implementation("eager")
    queries, image = QUERIES
    expected = model(queries, encoder_hidden_states=image, output_attentions=True)
    report = mmkernels.patch(model)
    assert report.replaced == ["encoder.layer.0.crossattention.attention"]
    assert "attend to each other" in report.left_alone["encoder.layer.0.attention.attention"]
    found = model(queries, encoder_hidden_states=image, output_attentions=True)
    assert not absorbed
    assert_equal(found.cross_attentions, expected.cross_attentions)
    assert model(queries, encoder_hidden_states=image).cross_attentions is None
    assert len(absorbed) == 1


def test_in_a_model(absorbed):
    """SigLIP's vision model; compiled in one graph."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = randomised(SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=2, num_hidden_layers=1, **SIZES)))
    picture = draw(2, 3, 16, 16)
    report = mmkernels.patch(model)
    assert report.replaced == ["head"]
    with torch.no_grad():
        found = model(picture).pooler_output
        compiled = torch.compile(model.head, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(model(picture).last_hidden_state), found)
    assert absorbed
