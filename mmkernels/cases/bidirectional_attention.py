"""Sizes, layouts, masks, options."""

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
from .layouts import MASKS, contiguous, mask_random, reaching

OUTPUTS = ("image_out", "text_out")


def generate():
    def case(
        group,
        name,
        shape,
        *,
        make=contiguous,
        make_text=None,
        image_mask=None,
        text_mask=None,
        gain=1,
        common=(),
        **options,
    ):
        def build(draw):
            batch, heads, positions, tokens, d, dv = shape
            text = make_text or make
            arguments = {
                "image_query": make(draw, batch, heads, positions, d),
                "text_key": text(draw, batch, heads, tokens, d),
                "image_value": make(draw, batch, heads, positions, dv),
                "text_value": text(draw, batch, heads, tokens, dv),
                **options,
            }
            if gain != 1:
                arguments["image_query"] = arguments["image_query"] * gain
            for name in common:
                arguments[name] = in_common(draw, arguments[name])
            if callable(options.get("scale")):
                arguments["scale"] = options["scale"](arguments["image_query"], arguments["text_key"])
            if image_mask is not None:
                arguments["image_mask"] = image_mask(draw, batch, positions)
            if text_mask is not None:
                arguments["text_mask"] = text_mask(draw, batch, tokens)
            return arguments

        return Case(f"{group}: {name}", group, build, heads_small(shape))

    for i, shape in enumerate((*HEAD_SIZES, *HEAD_SIZES_LARGE)):
        yield case("sizes" if i < len(HEAD_SIZES) else "large", "x".join(map(str, shape)), shape)
    for shape in ((0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6)):
        yield case("empty", "x".join(map(str, shape)), shape)

    some = (2, 2, 21, 19, 12, 10)
    for make in HEADS:
        yield case("views", make.__name__, some, make=make)
        yield case("views", f"{make.__name__} masks", some, make=make, image_mask=mask_random, text_mask=mask_random)
    yield case("views", "heads_last image, contiguous text", some, make=heads_last, make_text=contiguous)
    for name, mask in MASKS.items():
        yield case("masks", f"image {name}", some, image_mask=mask)
        yield case("masks", f"text {name}", some, text_mask=mask)
        yield case("masks", f"both {name}", some, image_mask=mask, text_mask=mask)
    yield case("masks", "both, 1023 tokens", (2, 1, 65, 1023, 24, 24), image_mask=mask_random, text_mask=mask_random)
    yield case(
        "masks", "both, 20011 positions", (1, 2, 20_011, 20, 16, 16), image_mask=mask_random, text_mask=mask_random
    )
    for scale in (0.3, 0.0, -1.0, 1):
        yield case("options", f"scale {scale}", some, scale=scale)
    yield case("options", "large scores", (1, 2, 40, 33, 24, 16), gain=8)
    for sign in (1, -1):
        yield case("extremes", f"scores near the largest, {sign}", some, scale=reaching(sign))
        yield case(
            "extremes",
            f"scores near the largest, {sign}, masks",
            some,
            scale=reaching(sign),
            image_mask=mask_random,
            text_mask=mask_random,
        )
        yield case(
            "extremes", f"scores near the largest, {sign}, 70 tokens", (1, 1, 130, 70, 12, 10), scale=reaching(sign)
        )
    for names in (("text_key",), ("image_query",), ("image_query", "text_key")):
        for shape in IN_COMMON_SIZES:
            yield case(
                "extremes",
                f"{', '.join(names)} in common, {shape[3]} tokens",
                shape,
                common=names,
                scale=IN_COMMON_SCALE,
            )
