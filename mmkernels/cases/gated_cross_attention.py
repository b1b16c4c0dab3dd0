"""Sizes, layouts, masks of every kind and shape, options."""

import torch

from .common import Case, in_common
from .heads import (
    HEAD_SIZES,
    HEAD_SIZES_LARGE,
    HEADS,
    IN_COMMON_SCALE,
    IN_COMMON_SIZES,
    heads_last,
    heads_small,
)
from .layouts import (
    contiguous,
    mask_all,
    mask_none,
    mask_one,
    mask_strided,
    mask_transposed,
    mask_whole_sample,
    reaching,
)


def generate():
    def case(
        group, name, shape, *, make=contiguous, make_text=None, gate=True, mask=None, gain=1, common=(), **options
    ):
        def build(draw):
            batch, heads, positions, tokens, d, dv = shape
            text = make_text or make
            arguments = {
                "query": make(draw, batch, heads, positions, d),
                "key": text(draw, batch, heads, tokens, d),
                "value": text(draw, batch, heads, tokens, dv),
                **options,
            }
            if gain != 1:
                arguments["query"] = arguments["query"] * gain
            for name in common:
                arguments[name] = in_common(draw, arguments[name])
            if callable(options.get("scale")):
                arguments["scale"] = options["scale"](arguments["query"], arguments["key"])
            if gate:
                arguments["gate"] = make(draw, batch, heads, positions, dv)
            if mask is not None:
                arguments["attn_mask"] = mask(draw, batch, heads, positions, tokens)
            return arguments

        return Case(f"{group}: {name}", group, build, heads_small(shape))

    for i, shape in enumerate((*HEAD_SIZES, *HEAD_SIZES_LARGE)):
        name = "x".join(map(str, shape))
        yield case("sizes" if i < len(HEAD_SIZES) else "large", name, shape, gate=i % 3 != 0, need_weights=i % 4 == 0)
    for shape in ((0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6)):
        yield case("empty", "x".join(map(str, shape)), shape, need_weights=True)

    some = (2, 2, 21, 19, 12, 10)
    for make in HEADS:
        yield case("views", make.__name__, some, make=make)
        yield case(
            "views", f"{make.__name__} mask", some, make=make, mask=lambda draw, b, h, n, t: draw.mask(b, t), gate=False
        )
    yield case("views", "heads_last image, contiguous text", some, make=heads_last, make_text=contiguous)

    masks = {
        "BT": lambda draw, b, h, n, t: draw.mask(b, t),
        "B11T": lambda draw, b, h, n, t: draw.mask(b, 1, 1, t),
        "BHNT": lambda draw, b, h, n, t: draw.mask(b, h, n, t),
        "11NT": lambda draw, b, h, n, t: draw.mask(1, 1, n, t),
        "T": lambda draw, b, h, n, t: draw.mask(t),
        "1H1T": lambda draw, b, h, n, t: draw.mask(1, h, 1, t),
        "BHN1": lambda draw, b, h, n, t: draw.mask(b, h, n, 1),
        "all": lambda draw, b, h, n, t: mask_all(draw, b, t),
        "none": lambda draw, b, h, n, t: mask_none(draw, b, t),
        "one": lambda draw, b, h, n, t: mask_one(draw, b, t),
        "whole sample": lambda draw, b, h, n, t: mask_whole_sample(draw, b, t),
        "whole sample BHNT": lambda draw, b, h, n, t: mask_whole_sample(draw, b, h, n, t),
        "strided": lambda draw, b, h, n, t: mask_strided(draw, b, h, n, t),
        "transposed": lambda draw, b, h, n, t: mask_transposed(draw, b, h, n, t),
        "causal": lambda draw, b, h, n, t: torch.ones(n, t, dtype=torch.bool, device=draw.device).tril()[None, None],
        "float BT": lambda draw, b, h, n, t: draw.normal(b, t),
        "float BHNT": lambda draw, b, h, n, t: draw.normal(b, h, n, t),
        "float 11NT": lambda draw, b, h, n, t: draw.normal(1, 1, n, t),
        "float H11": lambda draw, b, h, n, t: draw.normal(h, 1, 1),
        "float transposed": lambda draw, b, h, n, t: draw.normal(b, h, t, n).mT,
        "float -inf": lambda draw, b, h, n, t: draw.normal(b, h, n, t).masked_fill(
            ~draw.mask(b, h, n, t), float("-inf")
        ),
    }
    for name, mask in masks.items():
        yield case("masks", name, some, mask=mask, need_weights=name in ("BT", "BHNT", "float 11NT"))
        yield case("masks", f"{name}, no gate", (2, 1, 5, 37, 20, 8), mask=mask, gate=False)
    yield case(
        "masks", "BT, as many samples as positions", (3, 2, 3, 5, 12, 10), mask=lambda draw, b, h, n, t: draw.mask(b, t)
    )
    # As Hugging Face pads: the dtype's lowest number, in base 2 beyond the range of floats.
    extremes = {
        "lowest everywhere": lambda draw, b, h, n, t: draw.padding(mask_none(draw, b, 1, 1, t), -draw.largest),
        "lowest padding": lambda draw, b, h, n, t: draw.padding(draw.mask(b, 1, 1, t), -draw.largest),
        "lowest, a whole sample": lambda draw, b, h, n, t: draw.padding(
            mask_whole_sample(draw, b, h, n, t), -draw.largest
        ),
        "lowest but one": lambda draw, b, h, n, t: draw.padding(mask_one(draw, b, t), -draw.largest),
        "-inf but one": lambda draw, b, h, n, t: draw.padding(mask_one(draw, b, t), float("-inf")),
        "lowest and -inf": lambda draw, b, h, n, t: draw.padding(draw.mask(b, h, n, t), float("-inf")).clamp(
            max=-draw.largest
        ),
        "largest at one": lambda draw, b, h, n, t: draw.padding(~mask_one(draw, b, t), draw.largest),
        "largest at some": lambda draw, b, h, n, t: draw.padding(draw.mask(b, h, n, t), draw.largest),
        "lowest and largest": lambda draw, b, h, n, t: (
            draw.padding(draw.mask(b, h, n, t), -draw.largest) + draw.padding(draw.mask(b, h, n, t), draw.largest)
        ),
    }
    for name, mask in extremes.items():
        yield case("extremes", name, some, mask=mask)
        yield case("extremes", f"{name}, no gate, 1023 tokens", (2, 1, 3, 1023, 4, 5), mask=mask, gate=False)
    for sign in (1, -1):
        yield case("extremes", f"scores near the largest, {sign}", some, scale=reaching(sign))
        yield case(
            "extremes",
            f"scores near the largest, {sign}, no gate, mask",
            some,
            scale=reaching(sign),
            gate=False,
            mask=lambda draw, b, h, n, t: draw.mask(b, t),
        )

    for names in (("key",), ("query", "key")):
        for shape in IN_COMMON_SIZES:
            yield case(
                "extremes",
                f"{', '.join(names)} in common, {shape[3]} tokens",
                shape,
                common=names,
                scale=IN_COMMON_SCALE,
                gate=shape[3] < 100,
            )

    yield case("masks", "BT, 1023 tokens", (2, 1, 65, 1023, 24, 24), mask=lambda draw, b, h, n, t: draw.mask(b, t))
    yield case(
        "masks", "BHNT, 1023 tokens", (2, 1, 65, 1023, 24, 24), mask=lambda draw, b, h, n, t: draw.mask(b, h, n, t)
    )

    for scale in (0.3, 0.0, -1.0, 1):
        yield case("options", f"scale {scale}", some, scale=scale)
    yield case("options", "large scores", (1, 2, 40, 33, 24, 16), gain=8)
    yield case("options", "large scores, no gate", (1, 2, 40, 33, 24, 16), gain=8, gate=False)
