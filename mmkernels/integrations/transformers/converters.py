"""Which classes of transformers an operation fits, by full name: no model is imported to look."""

from . import deformable, fusion, pooling
from .reasons import why_not as why_not


def _models(convert, suffix, **classes):
    """``{full name: convert}`` of a class that many models have: `classes` are (model's folder) = (prefix)."""
    return {
        f"transformers.models.{folder}.modeling_{folder}.{prefix}{suffix}": convert
        for folder, prefix in classes.items()
    }


CONVERTERS = {
    **_models(
        deformable.convert,
        "MultiscaleDeformableAttention",
        deformable_detr="DeformableDetr",
        grounding_dino="GroundingDino",
        lw_detr="LwDetr",
        mm_grounding_dino="MMGroundingDino",
        pp_doclayout_v2="PPDocLayoutV2",
        pp_doclayout_v3="PPDocLayoutV3",
        pp_doclayout_v4="PPDocLayoutV4",
        rf_detr="RfDetr",
        rt_detr="RTDetr",
    ),
    **_models(deformable.convert_always_weights, "MultiscaleDeformableAttention", omdet_turbo="OmDetTurbo"),
    **_models(
        deformable.convert_padding_mask,
        "PixelDecoderEncoderMultiscaleDeformableAttention",
        mask2former="Mask2Former",
        oneformer="OneFormer",
    ),
    **_models(
        deformable.convert_uneven,
        "MultiscaleDeformableAttention",
        d_fine="DFine",
        deimv2="Deimv2",
        rt_detr_v2="RTDetrV2",
    ),
    **_models(
        fusion.convert,
        "BiMultiHeadAttention",
        grounding_dino="GroundingDino",
        mm_grounding_dino="MMGroundingDino",
    ),
    **_models(
        fusion.convert_encoder,
        "Encoder",
        grounding_dino="GroundingDino",
        mm_grounding_dino="MMGroundingDino",
    ),
    **_models(
        pooling.convert_probe,
        "MultiheadAttentionPoolingHead",
        idefics2="Idefics2",
        phi4_multimodal="Phi4MultimodalVision",
        siglip="Siglip",
        siglip2="Siglip2",
    ),
    **_models(pooling.convert_class_token, "AttentionPoolingHead", aimv2="Aimv2"),
    **_models(pooling.convert_per_channel, "MultiheadAttentionPoolingHead", videoprism="VideoPrism"),
    **_models(pooling.convert_cross, "PoolerCrossAttention", vjepa2="VJEPA2"),
    **_models(
        pooling.convert_qformer,
        "QFormerMultiHeadAttention",
        blip_2="Blip2",
        instructblip="InstructBlip",
        instructblipvideo="InstructBlipVideo",
    ),
    **_models(pooling.convert_perceiver, "SelfAttention", perceiver="Perceiver"),
}
