"""Attention of transformers by name: models agree with eager attention, padded or not, and SDPA does the rest."""

import pytest
import torch
from support.attention_tests import assert_rule, draw
from torch import nn

from mmkernels import functional

pytest.importorskip("transformers")

from support.transformers_modules import randomised
from transformers import AttentionInterface, AttentionMaskInterface

from mmkernels.integrations.transformers import interface, register

register()
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
PADDED = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def tokens(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape) * 7 % 50


def bert():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=50, **SIZES, hidden_dropout_prob=0.0))
    return model, {"input_ids": tokens(2, 9), "attention_mask": PADDED}


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)), {"pixel_values": draw(2, 3, 16, 16)}


def clip():
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 50, "eos_token_id": 2, **SIZES},
            vision_config={"image_size": 16, "patch_size": 4, **SIZES},
            projection_dim=8,
        )
    )
    return model, {"input_ids": tokens(2, 9), "attention_mask": PADDED, "pixel_values": draw(2, 3, 16, 16)}


def siglip():
    from transformers import SiglipConfig, SiglipModel

    model = SiglipModel(
        SiglipConfig(
            text_config={"vocab_size": 50, **SIZES}, vision_config={"image_size": 16, "patch_size": 4, **SIZES}
        )
    )
    return model, {"input_ids": tokens(2, 9), "attention_mask": PADDED, "pixel_values": draw(2, 3, 16, 16)}


def llama():
    """A decoder: its masks are of each query's own, or none and causal; heads share keys and values."""
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES))
    return model, {"input_ids": tokens(2, 9), "attention_mask": PADDED.flip(1)}


def eurobert():
    """An encoder whose heads share keys and values."""
    from transformers import EuroBertConfig, EuroBertModel

    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "mask"))}
    model = EuroBertModel(EuroBertConfig(vocab_size=50, num_key_value_heads=2, **special, **SIZES))
    return model, {"input_ids": tokens(2, 9), "attention_mask": PADDED}


def whisper():
    from transformers import WhisperConfig, WhisperModel

    model = WhisperModel(
        WhisperConfig(
            vocab_size=50,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_source_positions=10,
            max_target_positions=12,
            pad_token_id=0,
        )
    )
    return model, {"input_features": draw(2, 8, 20), "decoder_input_ids": tokens(2, 6)}


def qformer():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(vocab_size=50, encoder_hidden_size=12, cross_attention_frequency=1, **SIZES)
    return Blip2QFormerModel(config), {
        "query_embeds": draw(2, 4, 16),
        "encoder_hidden_states": draw(2, 9, 12, seed=1),
        "encoder_attention_mask": PADDED,
    }


# (model, whether its attention is the operation's)
MODELS = {
    "bert": (bert, True),
    "vit": (vit, True),
    "clip": (clip, True),
    "siglip": (siglip, True),
    "llama": (llama, False),
    "eurobert": (eurobert, True),
    "whisper": (whisper, True),
    "qformer": (qformer, True),
}


@pytest.fixture
def counted(monkeypatch):
    """Shapes don't decide, and calls of the operation are counted."""
    calls = []
    attend = functional.gated_cross_attention
    monkeypatch.setattr(interface, "_faster", lambda query, key: True)
    monkeypatch.setattr(
        functional,
        "gated_cross_attention",
        lambda *tensors, **options: calls.append(tensors) or attend(*tensors, **options),
    )
    return calls


def states(model, arguments, implementation, dtype=torch.float32):
    """Every state that the model gives where nothing is padded."""
    model.set_attn_implementation(implementation)
    model.to(dtype)
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}
    with torch.no_grad():
        found = model(**arguments)
    part = arguments.get("attention_mask", arguments.get("decoder_attention_mask"))
    kept = []
    for tensor in found.to_tuple():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            padded = part is not None and tensor.shape[:2] == part.shape
            kept.append(tensor[part.bool()] if padded else tensor)
    assert kept
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_model(name, counted):
    make, ours = MODELS[name]
    model, arguments = make()
    randomised(model)
    plain = states(model, arguments, "eager")
    assert not counted
    found = states(model, arguments, "mmkernels")
    assert bool(counted) == ours
    # Eager attention takes the softmax in float32, always.
    assert_rule(found, states(model, arguments, "sdpa", torch.float64), plain)


@pytest.mark.parametrize("name", ["bert", "eurobert", "qformer"])
def test_padding_isnt_dropped(name, counted):
    """What is padded changes nothing, and without the mask it would."""
    make, _ = MODELS[name]
    model, arguments = make()
    randomised(model)
    before = states(model, arguments, "mmkernels")
    other = dict(arguments)
    if name == "qformer":
        other["encoder_hidden_states"] = arguments["encoder_hidden_states"].where(PADDED[..., None].bool(), 7.0)
    else:
        other["input_ids"] = arguments["input_ids"].where(PADDED.bool(), 3)
    assert all(torch.equal(a, b) for a, b in zip(states(model, other, "mmkernels"), before, strict=True))
    mask = "encoder_attention_mask" if name == "qformer" else "attention_mask"
    part = other.pop(mask)
    unmasked = states(model, other, "mmkernels")
    assert not torch.equal(unmasked[0][1, :5], before[0][-5:] if name != "qformer" else before[0][1, :5])
    assert counted and part is PADDED


class Attention(nn.Module):
    is_causal = False
    num_key_value_groups = 1


def heads(tokens=9, shared=1, dtype=torch.float32):
    """query, key, value: views of what projections give; keys and values have 4 / shared heads."""
    sizes = ((7, 4), (tokens, 4 // shared), (tokens, 4 // shared))
    return [draw(2, n, h, 8, dtype=dtype, seed=i).transpose(1, 2) for i, (n, h) in enumerate(sizes)]


def attend(module, *tensors, implementation="mmkernels", **options):
    options.setdefault("attention_mask", None)
    return AttentionInterface()[implementation](module, *tensors, **options)[0]


PADDING = PADDED.bool()[:, None, None].expand(2, 1, 7, 9)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(
    "mask", [None, PADDING, PADDING[:, :, :1], PADDING[1:, :, :1].expand(2, 4, 1, 9), PADDING[:, :, :1].float() * 3]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(shared, mask, dtype, counted):
    module = Attention()
    module.num_key_value_groups = shared
    tensors = heads(shared=shared, dtype=dtype)

    def run(implementation, tensors, mask):
        leaves = [t.detach().requires_grad_() for t in tensors]
        result = attend(module, *leaves, implementation=implementation, attention_mask=mask, scaling=0.3)
        return result.detach(), *torch.autograd.grad(result, leaves, draw(*result.shape, seed=9).to(result.dtype))

    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    truth = run("sdpa", [t.double() for t in tensors], wide)
    plain = run("sdpa", tensors, mask)
    assert not counted
    found = run("mmkernels", tensors, mask)
    assert counted
    assert_rule(found, truth, plain)
    # Shared heads are views: of the same memory.
    for given in counted:
        assert given[1].untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr()
    assert found[0].is_contiguous() and found[0].shape == (2, 7, 4, 8)


TO_SDPA = {
    "dropout": {"dropout": 0.5},
    "causal": {"is_causal": True},
    "position bias": {"position_bias": draw(1, 4, 7, 9)},
    "pairs": {"attention_mask": torch.arange(63).view(1, 1, 7, 9) % 4 > 0},
    "weights": {"output_attentions": True},
}


@pytest.mark.parametrize("why", TO_SDPA)
def test_to_sdpa(why, counted):
    torch.manual_seed(0)
    expected = attend(Attention(), *heads(), implementation="sdpa", **TO_SDPA[why])
    torch.manual_seed(0)
    assert torch.equal(attend(Attention(), *heads(), **TO_SDPA[why]), expected)
    assert not counted


def test_causal_by_the_module(counted):
    module = Attention()
    module.is_causal = True
    assert torch.equal(attend(module, *heads(7)), attend(module, *heads(7), implementation="sdpa"))
    assert not counted
    query, key, value = heads()
    attend(module, query[:, :, :1], key, value)  # one query, which all keys precede
    assert len(counted) == 1


def test_what_sdpa_cannot_do_either(counted):
    """It refuses a cap, and would leave sinks out."""
    with pytest.raises(ValueError, match="softcap"):
        attend(Attention(), *heads(), softcap=3.0)
    for name in interface.SINKS:
        with pytest.raises(ValueError, match=f"{name} .attention sinks. aren't supported by 'mmkernels'"):
            attend(Attention(), *heads(), **{name: torch.zeros(4)})
    assert not counted


@pytest.mark.parametrize(
    ("shape", "dtype", "faster"),
    [
        ((1, 12, 257, 257), torch.float32, True),
        ((1, 12, 16, 2048), torch.float32, False),
        ((1, 8, 4096, 16), torch.float32, False),
        ((1, 12, 64, 64), torch.float32, False),
        ((1, 16, 1, 729), torch.float32, False),
        ((1, 16, 1, 729), torch.bfloat16, True),
    ],
)
def test_shapes_decide(shape, dtype, faster):
    batch, heads, positions, tokens = shape
    query = torch.empty(batch, heads, positions, 8, dtype=dtype, device="meta")
    key = torch.empty(batch, heads, tokens, 8, dtype=dtype, device="meta")
    assert interface._faster(query, key) == faster


def test_one_row_of_mask_stands_for_all_queries():
    """As SDPA's own mask has them."""
    arguments = {"batch_size": 2, "q_length": 7, "kv_length": 9, "allow_is_causal_skip": False}
    masks = AttentionMaskInterface()
    for function in (interface.bidirectional_mask_function, interface.causal_mask_function):
        ours, theirs = (
            masks[name](**arguments, mask_function=function, attention_mask=PADDED.bool())
            for name in ("mmkernels", "sdpa")
        )
        assert torch.equal(ours, theirs)
        assert (ours.stride(2) == 0) == (function is interface.bidirectional_mask_function)


def test_compiled(counted):
    """In one graph."""
    module, tensors = Attention(), heads(shared=2)
    module.num_key_value_groups = 2
    run = lambda *tensors: attend(module, *tensors, attention_mask=PADDING)
    eager = run(*tensors)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(*tensors), eager)


def test_exported_with_open_sizes():
    """Thresholds close none of them: SDPA computes it. A graph of known sizes has the operation."""

    def exported(**options):
        query, key, value = (draw(2, 64, 16, 8, seed=i).transpose(1, 2) for i in range(3))
        return str(torch.export.export(Called(), (query, key, value), **options))

    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    assert "mmkernels" not in exported(dynamic_shapes=(sizes, sizes, sizes))
    assert "mmkernels" in exported()


class Called(nn.Module):
    def forward(self, query, key, value):
        return attend(Attention(), query, key, value)


def test_registered_twice():
    register()
    assert AttentionInterface()["mmkernels"] is interface.attention
