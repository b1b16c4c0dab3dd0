"""Whole detection and segmentation models of transformers, as small as their configurations let them be."""

import copy
import functools

import torch
import transformers as hf
from torch import nn

from mmkernels import tolerance

from .attention_tests import draw
from .patched import upstream_of
from .transformers_modules import randomised

SIZES = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "decoder_layers": 2,
}
PICTURE = draw(1, 3, 64, 96)
IDS = torch.tensor([[101, 700, 800, 1012, 102]])
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def swin(*stages):
    return hf.SwinConfig(
        image_size=64, embed_dim=12, depths=[1] * 4, num_heads=[1, 2, 2, 3], window_size=4, out_features=list(stages)
    )


def grounding_dino(prefix):
    text = hf.BertConfig(
        vocab_size=1200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = getattr(hf, f"{prefix}Config")(
        backbone_config=swin("stage2", "stage3", "stage4"),
        text_config=text,
        encoder_layers=1,
        fusion_droppath=0.0,
        **SIZES,
    )
    return getattr(hf, f"{prefix}ForObjectDetection")(config), TEXT


def deformable_detr():
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = hf.DeformableDetrConfig(backbone_config=backbone, encoder_layers=1, **SIZES)
    return hf.DeformableDetrForObjectDetection(config), {}


def rt_detr(prefix):
    """RT-DETR and RT-DETRv2."""
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    channels = {"encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
    config = getattr(hf, f"{prefix}Config")(backbone_config=backbone, **channels, **SIZES)
    return getattr(hf, f"{prefix}ForObjectDetection")(config), {}


def on_hgnet(prefix, stages=("stage2", "stage3", "stage4"), **options):
    """D-FINE, DEIMv2 and PP-DocLayout."""
    backbone = hf.HGNetV2Config(
        stem_channels=[3, 8, 8],
        hidden_sizes=[16, 24, 32, 40],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[4, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        out_features=list(stages),
    )
    channels = {"encoder_in_channels": [24, 32, 40], "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
    config = getattr(hf, f"{prefix}Config")(backbone_config=backbone, **channels, **SIZES, **options)
    return getattr(hf, f"{prefix}ForObjectDetection")(config), {}


def lw_detr():
    """Its backbone divides a square picture into windows."""
    backbone = hf.LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=16,
        mlp_ratio=1,
        num_windows=4,
        window_block_indices=[0],
        out_features=["stage2"],
    )
    config = hf.LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[1.0, 2.0],
        hidden_expansion=0.5,
        c2f_num_blocks=1,
        d_model=32,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        decoder_ffn_dim=16,
        num_queries=5,
        group_detr=2,
    )
    return hf.LwDetrForObjectDetection(config), {"pixel_values": PICTURE[..., :64]}


def pp_doclayout_v2():
    """It also puts what it found into an order to be read in."""
    order = hf.PPDocLayoutV2Config().reading_order_config
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"coordinate_size": 4, "shape_size": 4, "global_pointer_head_size": 8, "num_classes": 3}
    order.update(sizes)
    return on_hgnet(
        "PPDocLayoutV2",
        reading_order_config=order,
        num_labels=3,
        class_thresholds=[0.5] * 3,
        class_order=[2, 0, 1],
    )


def rf_detr():
    """Its backbone divides a square picture into windows."""
    backbone = hf.models.rf_detr.RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        mlp_ratio=1,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    config = hf.RfDetrConfig(
        backbone_config=backbone,
        c2f_num_blocks=1,
        d_model=32,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        decoder_ffn_dim=16,
        num_queries=5,
        group_detr=2,
    )
    return hf.RfDetrForObjectDetection(config), {"pixel_values": PICTURE[..., :64]}


def omdet_turbo():
    text = hf.CLIPTextConfig(
        vocab_size=1200,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1199,
    )
    config = hf.OmDetTurboConfig(
        backbone_config=swin("stage2", "stage3", "stage4"),
        text_config=text,
        apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        task_encoder_hidden_dim=16,
        num_queries=5,
        vision_features_channels=[32] * 3,
        encoder_in_channels=[24, 48, 96],
        encoder_hidden_dim=32,
        encoder_attention_heads=4,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
    )
    model = hf.OmDetTurboForObjectDetection(config)
    model.register_forward_pre_hook(forget_texts)
    texts = {f"{what}_{name}": value for what in ("classes", "tasks") for name, value in TEXT.items()}
    return model, {**texts, "classes_structure": torch.tensor([1])}


def forget_texts(model, inputs):
    """It keeps what it has read before, of any dtype, and the graph of its gradients."""
    model.language_cache_class.cache.clear()
    model.language_cache_prompt.cache.clear()


def segmentation(prefix, **inputs):
    """Mask2Former and OneFormer."""
    options = {"is_training": False, "text_encoder_width": 16, "task_seq_len": 5} if prefix == "OneFormer" else {}
    sizes = dict.fromkeys(("hidden_dim", "mask_dim", "conv_dim", "feature_size", "mask_feature_size"), 32)
    config = getattr(hf, f"{prefix}Config")(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=5,
        **sizes,
        **options,
    )
    return getattr(hf, f"{prefix}ForUniversalSegmentation")(config), inputs


# (model and what it takes beside a picture, operations that patch finds in it)
MODELS = {
    "grounding_dino": (lambda: grounding_dino("GroundingDino"), {"deformable_attention", "bidirectional_attention"}),
    "mm_grounding_dino": (
        lambda: grounding_dino("MMGroundingDino"),
        {"deformable_attention", "bidirectional_attention"},
    ),
    "deformable_detr": (deformable_detr, {"deformable_attention"}),
    "rt_detr": (lambda: rt_detr("RTDetr"), {"deformable_attention"}),
    "rt_detr_v2": (lambda: rt_detr("RTDetrV2"), {"deformable_attention"}),
    "d_fine": (lambda: on_hgnet("DFine", decoder_n_points=[3, 2, 3]), {"deformable_attention"}),
    "deimv2": (lambda: on_hgnet("Deimv2", decoder_n_points=[3, 2, 3]), {"deformable_attention"}),
    "pp_doclayout_v2": (pp_doclayout_v2, {"deformable_attention"}),
    "pp_doclayout_v3": (
        lambda: on_hgnet(
            "PPDocLayoutV3", ["stage1", "stage2", "stage3", "stage4"], mask_feature_channels=[8, 8], x4_feat_dim=16
        ),
        {"deformable_attention"},
    ),
    "rf_detr": (rf_detr, {"deformable_attention"}),
    "omdet_turbo": (omdet_turbo, {"deformable_attention"}),
    "pp_doclayout_v4": (lambda: on_hgnet("PPDocLayoutV4"), {"deformable_attention"}),
    "lw_detr": (lw_detr, {"deformable_attention"}),
    "mask2former": (lambda: segmentation("Mask2Former"), {"deformable_attention", "absorbed_attention"}),
    "oneformer": (
        lambda: segmentation("OneFormer", task_inputs=torch.arange(5)[None]),
        {"deformable_attention", "absorbed_attention"},
    ),
}


def build(name):
    make, _ = MODELS[name]
    model, inputs = make()
    randomised(model)
    for part, parameter in model.named_parameters():
        if "enc_out_bbox_embed" in part:
            parameter.data *= 0.2  # exponentials of it are sizes
    return model, {"pixel_values": PICTURE, **inputs}


def tensors(found):
    """Every tensor of an output, nested as it may be."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def run(model, inputs, **options):
    with torch.no_grad():
        return tensors(model(**inputs, **options))


def trained(model, inputs):
    """Names of parameters that get a gradient."""
    model.zero_grad()
    found = [t for t in tensors(model(**inputs)) if t.requires_grad]
    torch.autograd.backward(found, upstream_of(found))
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def truths(model, inputs, **options):
    """In float64: as it is, and with parameters and picture half an epsilon off. Of a whole model one draw of that
    tells too little: each number is the farthest one of four."""
    as_it_is = in_float64(model, inputs, torch.Tensor.double, **options)
    yield as_it_is
    draws = [
        in_float64(model, inputs, functools.partial(tolerance.half_an_epsilon_off, seed=seed), **options)
        for seed in range(4)
    ]
    farther = lambda true, a, b: torch.where((a - true).abs() > (b - true).abs(), a, b)
    yield [functools.reduce(functools.partial(farther, true), drawn) for true, *drawn in zip(as_it_is, *draws)]


def in_float64(model, inputs, change, **options):
    wide = copy.deepcopy(model)
    for part in wide.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = parameter if parameter is None else nn.Parameter(change(parameter.detach()))
    wide.double()
    return run(wide, {k: change(v) if v.is_floating_point() else v for k, v in inputs.items()}, **options)
