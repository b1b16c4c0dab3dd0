"""Tiny modules of transformers' real classes from its real configurations, and what they are called with."""

import importlib
import types

import torch
from torch import nn

import mmkernels
from mmkernels.integrations.transformers.fusion import convert_encoder

from .attention_tests import draw

WIDTH, HEADS, POINTS = 16, 2, 2
SHAPES = [(3, 5), (2, 3)]
POSITIONS = sum(y * x for y, x in SHAPES)
DETR = {
    "deformable_detr": "DeformableDetr",
    "grounding_dino": "GroundingDino",
    "lw_detr": "LwDetr",
    "mm_grounding_dino": "MMGroundingDino",
    "omdet_turbo": "OmDetTurbo",
    "pp_doclayout_v2": "PPDocLayoutV2",
    "pp_doclayout_v3": "PPDocLayoutV3",
    "pp_doclayout_v4": "PPDocLayoutV4",
    "rf_detr": "RfDetr",
    "rt_detr": "RTDetr",
}
PADDING_MASK = {"mask2former": "Mask2Former", "oneformer": "OneFormer"}
UNEVEN = {"d_fine": "DFine", "deimv2": "Deimv2", "rt_detr_v2": "RTDetrV2"}
FUSION = {name: DETR[name] for name in ("grounding_dino", "mm_grounding_dino")}


def source(folder):
    """A model's source, as a module."""
    return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")


def randomised(module):
    """Weights that make scores and offsets matter, the same for the same shapes; in eval."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i) * 0.5)
    return module.eval()


def deformable(folder):
    """Multi-scale deformable attention of any of the models."""
    if folder in PADDING_MASK:
        name = f"{PADDING_MASK[folder]}PixelDecoderEncoderMultiscaleDeformableAttention"
        return randomised(getattr(source(folder), name)(WIDTH, HEADS, len(SHAPES), POINTS))
    prefix = (DETR | UNEVEN)[folder]
    options = {"d_model": WIDTH, "num_feature_levels": len(SHAPES)}
    if folder in UNEVEN:
        points = POINTS if folder == "rt_detr_v2" else [3, 2]
        options |= {"decoder_attention_heads": HEADS, "decoder_n_points": points, "decoder_n_levels": len(SHAPES)}
    config = getattr(source(folder), f"{prefix}Config")(**options)
    config.num_feature_levels = len(SHAPES)  # some derive it from others
    arguments = (config,) if folder in UNEVEN else (config, HEADS, POINTS)
    return randomised(getattr(source(folder), f"{prefix}MultiscaleDeformableAttention")(*arguments))


def deformable_tensors(folder, coordinates, dtype=torch.float32):
    """hidden_states, encoder_hidden_states, reference_points, position_embeddings (not all models have them)."""
    levels = 1 if folder in UNEVEN and coordinates == 4 else len(SHAPES)
    return [
        draw(2, 7, WIDTH, dtype=dtype),
        draw(2, POSITIONS, WIDTH, dtype=dtype, seed=1),
        draw(2, 7, levels, coordinates, dtype=dtype, seed=2).sigmoid(),
        draw(2, 7, WIDTH, dtype=dtype, seed=3),
    ]


def call_deformable(folder, module, hidden, states, reference, position, masked=True, **options):
    """What the models' layers do. A position of each level and the end of the second image are padded."""
    part = torch.ones(2, POSITIONS, dtype=torch.bool)
    part[1, 10:] = False
    part[0, 3] = False
    if folder in ("d_fine", "deimv2"):
        masked = False  # theirs doesn't broadcast to heads
    else:
        options["position_embeddings"] = position
    if folder != "mask2former":
        options["spatial_shapes"] = torch.tensor(SHAPES)
    mask = ~part if folder in PADDING_MASK else part
    return module(
        hidden_states=hidden,
        attention_mask=mask if masked else None,
        encoder_hidden_states=states,
        reference_points=reference,
        spatial_shapes_list=SHAPES,
        **options,
    )


class Encoder(nn.Module):
    """Stands for the real one: who calls it asks for weights, or doesn't."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn
        self.config = types.SimpleNamespace(output_attentions=False)

    def forward(self, *arguments, output_attentions=None, **named):
        return self.attn(*arguments, **named)


mmkernels.integrations.register(Encoder, convert_encoder)


def fusion(folder, **options):
    """The layer in which image and text attend to each other, in an encoder."""
    prefix = FUSION[folder]
    config = getattr(source(folder), f"{prefix}Config")(
        d_model=WIDTH, encoder_ffn_dim=24, encoder_attention_heads=4, **options
    )
    return randomised(Encoder(getattr(source(folder), f"{prefix}BiMultiHeadAttention")(config)))


def fusion_tensors(dtype=torch.float32):
    return [draw(2, 40, WIDTH, dtype=dtype), draw(2, 5, WIDTH, dtype=dtype, seed=1)]


def call_fusion(module, vision, text, masked=True):
    """(image, text); of both samples something is padded."""
    masks = {}
    if masked:
        masks["vision_attention_mask"] = torch.arange(80).view(2, 40) > 71
        masks["text_attention_mask"] = torch.arange(10).view(2, 5) > 7
    (vision, _), (text, _) = module(vision, text, **masks)
    return vision, text
