"""Which classes of transformers an operation fits, by full name: no model is imported to look."""

from . import deformable, fusion


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
        omdet_turbo="OmDetTurbo",
        pp_doclayout_v2="PPDocLayoutV2",
        pp_doclayout_v3="PPDocLayoutV3",
        pp_doclayout_v4="PPDocLayoutV4",
        rf_detr="RfDetr",
        rt_detr="RTDetr",
    ),
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
}
