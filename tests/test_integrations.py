"""Modules of timm, open_clip, PyTorch, torchmil, MONAI and diffusers, patched: the same results and gradients, and
back, bit for bit."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule, draw
from support.no_torchvision import pretended
from support.patched import assert_equal, assert_patched, assert_same_in_onnx, with_gradients
from torch import nn

import mmkernels

in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def package(name):
    if name not in ("timm", "open_clip"):
        return pytest.importorskip(name)
    with pretended():
        return pytest.importorskip(name)


def drawn(module):
    """With parameters that matter: some begin as 0."""
    for i, parameter in enumerate(module.parameters()):
        scale = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        parameter.data = scale * draw(*parameter.shape, seed=100 + i)
    return module.eval()


def call(module, *tensors):
    return module(*tensors)


# nn.MultiheadAttention -----------------------------------------------------------------------------------------------


def multihead(module, query, image, mask=None):
    """A pooling head's call."""
    return module(query, image, image, key_padding_mask=mask, need_weights=False)[0]


def multihead_tensors(dtype=torch.float32, channels=32, first=True, queries=2):
    query, image = draw(3, queries, 32, seed=1), draw(3, 70, channels, seed=2)
    if not first:
        query, image = query.transpose(0, 1), image.transpose(0, 1)
    return query.to(dtype), image.to(dtype)


@in_both_dtypes
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 24, "vdim": 24}, {"batch_first": False}], ids=str)
def test_multihead(options, dtype):
    module = drawn(nn.MultiheadAttention(32, 4, **{"batch_first": True, **options}))
    first = options.get("batch_first", True)
    tensors = multihead_tensors(dtype, options.get("kdim", 32), first)
    assert_patched(multihead, module, tensors, "absorbed_attention")


def test_multihead_blocks_what_is_masked():
    module = drawn(nn.MultiheadAttention(32, 4, batch_first=True))
    mask = draw(3, 70, seed=3) > 0  # True = blocked
    assert_patched(multihead, module, (*multihead_tensors(), mask), "absorbed_attention")


class Calls:
    """Counts what an operation is called."""

    def __init__(self, monkeypatch, operation):
        self.count = 0
        function = getattr(mmkernels.functional, operation)

        def counted(*arguments, **named):
            self.count += 1
            return function(*arguments, **named)

        monkeypatch.setattr(mmkernels.functional, operation, counted)


@pytest.mark.parametrize(
    "how",
    [
        lambda m, q, x: m(q, x, x)[0],
        lambda m, q, x: m(x, x, x, need_weights=False)[0],
        lambda m, q, x: m(q, x, x.clone(), need_weights=False)[0],
        lambda m, q, x: m(q[0], x[0], x[0], need_weights=False)[0],
        lambda m, q, x: m(q, x, x, need_weights=False, attn_mask=torch.zeros(2, 70))[0],
        lambda m, q, x: m(q, x, x, need_weights=False, key_padding_mask=torch.zeros(3, 70))[0],
    ],
    ids=["weights", "self", "value", "unbatched", "attn_mask", "float mask"],
)
def test_multihead_elsewhere_goes_the_plain_way(how, monkeypatch):
    module = drawn(nn.MultiheadAttention(32, 4, batch_first=True))
    tensors = multihead_tensors()
    before = with_gradients(how, module, tensors)
    mmkernels.patch(module)
    calls = Calls(monkeypatch, "absorbed_attention")
    assert_equal(with_gradients(how, module, tensors), before)
    assert calls.count == 0
    multihead(module, *tensors)
    assert calls.count == 1


def test_multihead_with_dropout():
    module = drawn(nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True))
    assert mmkernels.patch(module).replaced == [""]
    module.train()
    torch.manual_seed(0)
    fused = multihead(module, *multihead_tensors())
    mmkernels.unpatch(module)
    torch.manual_seed(0)
    assert_equal(fused, multihead(module, *multihead_tensors()))
    assert "dropout 0.5" in mmkernels.patch(module).left_alone[""]


def test_multihead_in_sequences_of_different_lengths():
    """Nested tensors have no sizes to count."""
    module = drawn(nn.MultiheadAttention(32, 4, batch_first=True))
    sequences = torch.nested.nested_tensor([draw(5, 32), draw(7, 32)])
    run = lambda: module(sequences, sequences, sequences, need_weights=False)[0].unbind()
    with torch.no_grad():
        before = run()
        mmkernels.patch(module)
        assert_equal(run(), before)


def test_multihead_causal_without_a_mask_is_an_error():
    module = drawn(nn.MultiheadAttention(32, 4, batch_first=True))
    query, image = multihead_tensors()
    mmkernels.patch(module)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        module(query, image, image, need_weights=False, is_causal=True)


# timm ----------------------------------------------------------------------------------------------------------------


@in_both_dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"latent_len": 3, "pool_type": "avg"}, {"pos_embed": "abs", "feat_size": 70}, {"out_features": 0}],
    ids=str,
)
def test_timm_latent(options, dtype):
    layers = package("timm").layers
    module = drawn(layers.AttentionPoolLatent(32, num_heads=4, **options))
    assert_patched(call, module, (draw(2, 70, 32, seed=1).to(dtype),), "absorbed_attention")


@in_both_dtypes
@pytest.mark.parametrize("options", [{}, {"qkv_separate": True}, {"class_token": True}, {"feat_size": 5}], ids=str)
def test_timm_pool2d(options, dtype):
    layers = package("timm").layers
    module = drawn(layers.AttentionPool2d(32, **{"feat_size": 8, "head_dim": 8, **options}))
    assert_patched(call, module, (draw(2, 32, 8, 8, seed=1).to(dtype),), "absorbed_attention")


@in_both_dtypes
@pytest.mark.parametrize("options", [{}, {"fuse_add": True}, {"fuse_add": True, "fuse_scale": False}], ids=str)
def test_timm_context(options, dtype):
    layers = package("timm").layers
    module = drawn(layers.GlobalContext(32, **options))
    image = draw(2, 32, 7, 9, seed=1).to(dtype)
    assert_patched(call, module, (image,), "spatial_attention")
    assert_patched(call, module, (image.to(memory_format=torch.channels_last),), "spatial_attention")


def test_timm_left_alone():
    layers = package("timm").layers
    modules = {
        "normalised": layers.AttentionPoolLatent(32, num_heads=4, qk_norm=True),
        "rotated": layers.RotAttentionPool2d(32, head_dim=8),
        "every position": layers.AttentionPool2d(32, head_dim=8, pool_type=""),
        "the mean": layers.GlobalContext(32, use_attn=False),
    }
    for why, module in modules.items():
        assert why in mmkernels.patch(module).left_alone[""]


# open_clip -----------------------------------------------------------------------------------------------------------


@in_both_dtypes
def test_open_clip_pool2d(dtype):
    package("open_clip")
    from open_clip.modified_resnet import AttentionPool2d

    module = drawn(AttentionPool2d(7, 32, 4, 16))
    assert_patched(call, module, (draw(2, 32, 7, 7, seed=1).to(dtype),), "absorbed_attention")


def test_open_clip_coca():
    package("open_clip")
    from open_clip.transformer import AttentionalPooler

    module = drawn(AttentionalPooler(32, 32, n_head=4, n_queries=2))
    image = draw(2, 70, 32, seed=1)
    truth = with_gradients(call, copy.deepcopy(module).double(), (image.double(),))
    plain = with_gradients(call, module, (image,))
    assert mmkernels.patch(module).replaced == ["attn"]
    assert_rule(with_gradients(call, module, (image,)), truth, plain)


# Multiple instance learning ------------------------------------------------------------------------------------------


@in_both_dtypes
@pytest.mark.parametrize("options", [{}, {"gated": True}, {"act": "relu"}, {"act": "gelu", "gated": True}], ids=str)
def test_torchmil(options, dtype):
    package("torchmil")
    from torchmil.nn import AttentionPool

    module = drawn(AttentionPool(32, 24, **options))
    bags = draw(2, 33, 32, seed=1).to(dtype)
    assert_patched(call, module, (bags,), "additive_attention")
    mask = draw(2, 33, seed=2) > -0.5
    assert_patched(call, module, (bags, mask), "additive_attention")
    assert_patched(lambda m, x: m(x, return_att=True), module, (bags,), "additive_attention")


def test_torchmil_lazy():
    package("torchmil")
    from torchmil.nn import AttentionPool

    module = AttentionPool(att_dim=8)
    assert "call it once" in mmkernels.patch(module).left_alone[""]
    module(draw(1, 3, 5))
    assert mmkernels.patch(module).replaced == [""]


@in_both_dtypes
@pytest.mark.parametrize("mode", ["att", "att_trans"])
def test_monai(mode, dtype):
    nets = package("monai.networks.nets")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 32))
    module = drawn(nets.MILModel(3, mil_mode=mode, backbone=backbone, backbone_num_features=32))
    if mode == "att":
        assert_patched(call, module, (draw(2, 5, 3, 4, 4, seed=1).to(dtype),), "additive_attention")
    assert mmkernels.patch(module).replaced[0] == ""


def test_monai_left_alone():
    nets = package("monai.networks.nets")
    module = nets.MILModel(3, mil_mode="mean", backbone=nn.Linear(4, 4), backbone_num_features=4)
    assert "pools without attention" in mmkernels.patch(module).left_alone[""]


# All of them ---------------------------------------------------------------------------------------------------------


def timm_latent():
    return drawn(package("timm").layers.AttentionPoolLatent(32, num_heads=4)), (draw(2, 70, 32, seed=1),)


def timm_context():
    return drawn(package("timm").layers.GlobalContext(32)), (draw(2, 32, 7, 9, seed=1),)


def torchmil_pool():
    package("torchmil")
    from torchmil.nn import AttentionPool

    return drawn(AttentionPool(32, 24, gated=True)), (draw(2, 33, 32, seed=1),)


def monai_model():
    nets = package("monai.networks.nets")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 32))
    module = nets.MILModel(3, mil_mode="att", backbone=backbone, backbone_num_features=32)
    return drawn(module), (draw(2, 5, 3, 4, 4, seed=1),)


MODELS = {
    timm_latent: "absorbed_attention",
    timm_context: "spatial_attention",
    torchmil_pool: "additive_attention",
    monai_model: "additive_attention",
}


def scored_without_bias(module):
    module.attention[2] = nn.Linear(2048, 1, bias=False)
    drawn(module)


def scored_with_bias(module):
    module.fc2 = nn.Linear(24, 1)


def forward_of(name):
    """Somebody gives a part another forward."""

    def change(module):
        part = module.get_submodule(name)
        part.forward = lambda features, forward=part.forward: 2 * forward(features)

    return change


@pytest.mark.parametrize(
    "make, change",
    [
        (timm_latent, forward_of("k_norm")),
        (timm_context, forward_of("conv_attn")),
        (torchmil_pool, lambda module: setattr(module, "act_layer", nn.SiLU())),
        (torchmil_pool, lambda module: setattr(module, "act_gated", nn.Tanh())),
        (torchmil_pool, lambda module: setattr(module, "fc1", nn.Linear(32, 24))),
        (torchmil_pool, forward_of("act_layer")),
        (torchmil_pool, scored_with_bias),
        (monai_model, lambda module: setattr(module, "mil_mode", "max")),
        (monai_model, forward_of("attention.1")),
        (monai_model, forward_of("attention")),
    ],
)
def test_changed_after_patching(make, change):
    """As unpatched, bit for bit; patched afterwards it is left alone, or goes that way."""
    module, tensors = make()
    mmkernels.patch(module)
    change(module)
    found = with_gradients(call, module, tensors)
    assert mmkernels.unpatch(module) == [""]
    assert_equal(found, with_gradients(call, module, tensors))
    mmkernels.patch(module)
    assert_equal(found, with_gradients(call, module, tensors))


def test_score_without_bias():
    module, tensors = monai_model()
    scored_without_bias(module)
    assert_patched(call, module, tensors, "additive_attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_under_autocast(make, dtype, monkeypatch):
    """Features of the layer before are in bfloat16 there, parameters in float32."""
    module, tensors = make()
    if make is monai_model:
        module.net = nn.Flatten()
        tensors = (draw(2, 5, 32, 1, 1, seed=1),)
    tensors = [t.to(dtype) for t in tensors]
    truth = module.double()(*(t.double() for t in tensors)).detach()
    module.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = module(*tensors)
        mmkernels.patch(module)
        calls = Calls(monkeypatch, MODELS[make])
        found = module(*tensors)
    assert calls.count == 1
    assert found.dtype == plain.dtype
    assert_rule(found, truth, plain)


# diffusers -----------------------------------------------------------------------------------------------------------


def attention(**options):
    package("diffusers")
    from diffusers.models.attention_processor import Attention

    return drawn(Attention(32, heads=4, dim_head=8, **options))


@pytest.mark.parametrize("make", [*MODELS, attention])
def test_onnx(make):
    module, tensors = make() if make in MODELS else (make(), (draw(2, 33, 32),))
    assert_same_in_onnx(call, module, tensors)


@in_both_dtypes
@pytest.mark.parametrize(
    "options, image, text",
    [
        ({}, (2, 33, 32), None),
        ({"cross_attention_dim": 24}, (2, 33, 32), (2, 7, 24)),
        ({"residual_connection": True, "norm_num_groups": 4, "rescale_output_factor": 2.0}, (2, 32, 5, 7), None),
        (
            {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm", "qk_norm": "layer_norm"},
            (2, 9, 32),
            (2, 7, 24),
        ),
    ],
    ids=["self", "cross", "map", "norms"],
)
def test_diffusers_attention(options, image, text, dtype):
    module = attention(**options)
    tensors = [draw(*image, seed=1).to(dtype), *([] if text is None else [draw(*text, seed=2).to(dtype)])]
    assert_patched(call, module, tensors, "gated_cross_attention")


def test_diffusers_mask():
    module = attention(cross_attention_dim=24)
    mask = torch.zeros(2, 1, 7).masked_fill(draw(2, 1, 7, seed=3) > 0.5, -10000.0)
    tensors = draw(2, 33, 32, seed=1), draw(2, 7, 24, seed=2)
    assert_patched(lambda m, x, t: m(x, t, attention_mask=mask.to(x.dtype)), module, tensors, "gated_cross_attention")


def test_diffusers_other_processors_are_left_alone():
    module = attention()
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    before = module.processor
    assert type(before) is AttnProcessor2_0
    mmkernels.patch(module)
    assert type(module.processor) is mmkernels.integrations.diffusers.AttnProcessor
    mmkernels.unpatch(module)
    assert module.processor is before
    mmkernels.patch(module)
    own = AttnProcessor()
    module.set_processor(own)
    mmkernels.unpatch(module)
    assert module.processor is own
    assert "its processor is AttnProcessor" in mmkernels.patch(module).left_alone[""]


def test_diffusers_unet():
    """set_attn_processor, as diffusers offers it, and patch: a whole UNet."""
    package("diffusers")
    from diffusers import UNet2DConditionModel

    from mmkernels.integrations.diffusers import AttnProcessor

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    run = lambda module, image, text: module(image, 7, text).sample
    tensors = draw(2, 4, 8, 8, seed=1), draw(2, 5, 12, seed=2)
    truth = with_gradients(run, copy.deepcopy(unet).double(), [t.double() for t in tensors])
    plain = with_gradients(run, unet, tensors)
    before = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    assert_rule(with_gradients(run, unet, tensors), truth, plain)
    unet.set_attn_processor(dict(before))
    report = mmkernels.patch(unet)
    assert len(report) == len(before)
    assert_rule(with_gradients(run, unet, tensors), truth, plain)
    mmkernels.unpatch(unet)
    assert_equal(with_gradients(run, unet, tensors), plain)
