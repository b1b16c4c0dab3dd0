"""Sizes, layouts, masks, results, options."""

import copy
import functools

import torch

from .common import SMALL, Case, in_common
from .heads import HEADS
from .layouts import DENSE, MASKS, contiguous, mask_random, transposed

OUTPUTS = ("image_out", "text_out")

# B, H, N, T, D, Dv: sizes that fit no vector, tile, block or group of heads.
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (2, 1, 3, 1, 1, 3),
    (1, 2, 1, 3, 3, 1),
    (2, 3, 7, 5, 8, 8),
    (1, 2, 33, 17, 13, 21),
    (1, 1, 113, 20, 16, 16),
    (1, 4, 50, 7, 40, 24),
    (3, 2, 16, 16, 32, 32),
    (1, 16, 65, 1, 48, 5),
    (1, 1, 3, 113, 17, 7),
    (1, 2, 130, 31, 3, 5),
)
LARGE = (
    (1, 3, 113, 203, 64, 64),
    (1, 1, 1023, 77, 113, 97),
    (2, 1, 97, 1023, 40, 72),
    (1, 5, 203, 130, 64, 33),
    (1, 2, 65, 33, 300, 257),
    (1, 2, 20_011, 20, 16, 16),
    (1, 12, 50, 1, 1152, 40),
    (5, 3, 61, 64, 64, 64),
)


def generate():
    def case(
        group,
        name,
        shape,
        *,
        make=contiguous,
        make_text=contiguous,
        image_mask=None,
        text_mask=None,
        attend=True,
        bias=True,
        wide=False,
        gain=1,
        change=None,
        **options,
    ):
        def build(draw):
            batch, heads, positions, tokens, channels, value_channels = shape
            of_text = copy.copy(draw)
            if wide and draw.dtype != torch.float64:
                of_text.dtype = torch.float32
            key = make_text(of_text, batch, heads, tokens, channels)
            arguments = {
                "image": make(draw, batch, positions, channels),
                "key": (key * (gain * channels**-0.5)).to(key.dtype) if make_text is contiguous else key,
                "value": make_text(of_text, batch, heads, tokens, value_channels) if attend else None,
                "key_bias": of_text.normal(batch, heads, tokens) * gain if bias else None,
                **options,
            }
            if change is not None:
                arguments["image"] = change(draw, arguments["image"])
            if image_mask is not None:
                arguments["image_mask"] = image_mask(draw, batch, positions)
            if text_mask is not None:
                arguments["text_mask"] = text_mask(draw, batch, tokens)
            return arguments

        batch, heads, positions, tokens, channels, value_channels = shape
        small = batch * heads * positions * tokens * (channels + value_channels) <= 40 * SMALL
        return Case(f"{group}: {name}", group, build, small)

    for i, shape in enumerate((*SIZES, *LARGE)):
        yield case("sizes" if i < len(SIZES) else "large", "x".join(map(str, shape)), shape)
    for shape in ((0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6)):
        yield case("empty", "x".join(map(str, shape)), shape)

    some = (2, 2, 21, 19, 12, 10)
    for make in DENSE:
        yield case("views", f"image {make.__name__}", some, make=make)
    yield case("views", "image transposed, masks", some, make=transposed, image_mask=mask_random, text_mask=mask_random)
    for make in HEADS:
        yield case("views", f"text {make.__name__}", some, make_text=make)
    for name, mask in MASKS.items():
        yield case("masks", f"image {name}", some, image_mask=mask)
        yield case("masks", f"text {name}", some, text_mask=mask)
        yield case("masks", f"both {name}", some, image_mask=mask, text_mask=mask)
    yield case("masks", "both, 1023 tokens", (2, 1, 65, 1023, 24, 24), image_mask=mask_random, text_mask=mask_random)
    yield case("masks", "both, 9 heads", (1, 9, 113, 77, 24, 16), image_mask=mask_random, text_mask=mask_random)
    for wide in (False, True):
        words = ", text in float32" if wide else ""
        for masks in ({}, {"image_mask": mask_random, "text_mask": mask_random}):
            ending = words + (", masks" if masks else "")
            yield case("results", f"both{ending}", some, wide=wide, **masks)
            yield case("results", f"pool only{ending}", some, attend=False, wide=wide, **masks)
            yield case("results", f"pool only, no bias{ending}", some, attend=False, bias=False, wide=wide, **masks)
            yield case("results", f"image only{ending}", some, pool=False, wide=wide, **masks)
            yield case("results", f"no bias{ending}", some, bias=False, wide=wide, **masks)
    for words, change in (
        ("features in common", in_common),
        ("features in common, ill-conditioned", functools.partial(in_common, share=3, decades=4)),
    ):
        for shape in ((2, 2, 21, 5, 16, 12), (1, 2, 40, 60, 24, 16)):
            yield case("extremes", f"{words}, {shape[3]} tokens", shape, change=change)
        yield case("extremes", f"{words}, text in float32", shape, change=change, wide=True, text_mask=mask_random)
    yield case("extremes", "large scores", (1, 2, 40, 33, 24, 16), gain=8)
    yield case("extremes", "scores that choose one", (1, 2, 40, 33, 24, 16), gain=200)
