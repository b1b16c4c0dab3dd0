"""What a user's program looks like to a type checker: ``mypy --strict`` reads it (test_typing.py), nobody runs it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import mmkernels as mmk
from mmkernels import functional, reference
from mmkernels.models import ImageTextModel, PixelWordAttention, StackedAttentionNetwork, TopDownCaptioner

Pair = tuple[Tensor, Tensor]
image = torch.randn(8, 49, 64)
text = torch.randn(8, 64)
weight = torch.randn(64, 128)
heads = torch.randn(8, 4, 49, 16)
mask = torch.ones(8, 49, dtype=torch.bool)


def functions(either: bool) -> None:
    assert_type(mmk.spatial_attention(image, text), Tensor)
    assert_type(mmk.spatial_attention(image, text, mask=mask, num_heads=4, scale=1, combine="pool"), Tensor)
    assert_type(mmk.spatial_attention(image, text, need_weights=True), Pair)
    assert_type(mmk.spatial_attention(image, text, need_weights=either), Tensor | Pair)
    assert_type(mmk.channel_attention(image, text, weight, None), Tensor)
    assert_type(mmk.channel_attention(image, text, weight, need_weights=True), Pair)
    assert_type(mmk.gated_cross_attention(heads, heads, heads, gate=heads, attn_mask=mask), Tensor)
    assert_type(mmk.gated_cross_attention(heads, heads, heads, need_weights=True), Pair)
    assert_type(mmk.bidirectional_attention(heads, heads, heads, heads, text_mask=mask), Pair)
    assert_type(mmk.additive_attention(image, None, weight, None, weight, w_gate=weight, activation="relu"), Tensor)
    assert_type(mmk.additive_attention(image, text, weight, weight, weight, need_weights=True, backend="cpu"), Pair)
    assert_type(functional.spatial_attention(image[0], text, offsets=[0, 20, 49]), Tensor)
    assert_type(functional.spatial_attention(image[0], text, offsets=np.array([0, 49])), Tensor)
    assert_type(reference.spatial_attention(image, text, need_weights=True), Pair)


def modules(either: bool) -> None:
    spatial = mmk.SpatialAttention(64, 128, num_heads=4, layout="bdhw", device="cpu", dtype=torch.bfloat16)
    assert_type(spatial(image, text), Tensor)
    assert_type(spatial(image, text, need_weights=True), Pair)
    assert_type(spatial(image, text, need_weights=either), Tensor | Pair)
    gated = mmk.GatedCrossAttention(64, 128, 4, gate_activation=torch.tanh, norm=nn.LayerNorm(64))
    assert_type(gated(image, text, mask=mask), Tensor)
    assert_type(mmk.BidirectionalAttention(64, 128, 64, 4)(image, text, text_mask=mask), Pair)
    assert_type(mmk.AttentionPooling(64, 4, 8, absorb=True)(image, image_mask=mask), Tensor)
    levels = mmk.DeformableAttention(64, 4, num_levels=1, num_points=(4,))
    assert_type(levels(image, image, mask, [(7, 7)], mask=mask), Tensor)
    assert_type(mmk.absorb_pays(49, 1, 64, 64, 4, attend=False), bool)
    assert_type(mmk.ChannelAttention(64, 128).forward(image, text), Tensor)
    pool = mmk.AdditiveAttention(64, 16, gated=True)
    assert_type(pool(image, need_weights=True), Pair)
    assert_type(pool(image, need_scores=True), Pair)
    assert_type(pool(image, need_weights=True, need_scores=True), tuple[Tensor, Tensor, Tensor])
    assert_type(pool(image, need_weights=either), Tensor | Pair)
    model = ImageTextModel(architecture="aligned", combine="multiply")
    assert_type(model.predict(image, text), Tensor)
    assert_type(model(image, text, text_present=mask), Tensor)
    assert_type(model(image, text, target=image), Pair)
    assert_type(PixelWordAttention(64, 128)(image, text[:, None], mask=mask), Tensor)
    assert_type(StackedAttentionNetwork(64, 128, 10)(image, text, mask=mask, need_weights=True), Pair)
    assert_type(TopDownCaptioner(100, 64).generate(image, start=1, length=5), Tensor)
    nn.Sequential(spatial, gated).to("cpu")


def rest(run: Callable[[Tensor, Tensor], Tensor]) -> str:
    assert_type(mmk.SpatialAttentionFunction.apply(image, text, None, None, 1.0, 1, True, False, None), tuple[Any, ...])
    run = mmk.spatial_attention
    try:
        run(image, text)
    except mmk.BackendError as error:
        assert_type(error, mmk.BackendError)
    return mmk.__version__


def arrays() -> None:
    import numpy as np

    mmk.spatial_attention(image[0], text, offsets=np.array([0, 1]))


def mistakes() -> None:
    """Each is refused: an ignore that hides nothing would itself be an error."""
    mmk.spatial_attention(image, text, mask)  # type: ignore[call-overload]
    mmk.spatial_attention(image, text, combine="add")  # type: ignore[call-overload]
    mmk.spatial_attention(image, text, need_weights=1)  # type: ignore[call-overload]
    mmk.bidirectional_attention(heads, heads, heads)  # type: ignore[call-arg]
    reference.channel_attention(image, text, weight, backend="cpu")  # type: ignore[call-overload]
    mmk.SpatialAttention(64)  # type: ignore[call-arg]
    mmk.AdditiveAttention(64, 16, activation="sine")  # type: ignore[arg-type]
    mmk.ChannelAttention(64, 128)(image)  # type: ignore[call-overload]
    mmk.visual_attention()  # type: ignore[attr-defined]
