"""Sizes, layouts, options."""

import torch

from .common import SMALL, Case
from .layouts import (
    DENSE,
    contiguous,
    every_second_channel,
    near_largest,
    same_channel,
    same_for_all,
    transposed,
    window,
)

PARAMETERS = ("weight", "bias")


def generate():
    def case(
        group,
        name,
        shape,
        *,
        make=contiguous,
        make_text=contiguous,
        make_weight=contiguous,
        bias=True,
        gain=1,
        **options,
    ):
        """`shape`: B, N, D, E, or B, D, E for an image without positions."""

        def build(draw):
            *image, text = shape
            arguments = {
                "image": make(draw, *image),
                "text": make_text(draw, image[0], text),
                "weight": make_weight(draw, image[-1], image[-1] + text) * (gain * (image[-1] + text) ** -0.5),
                **options,
            }
            if bias:
                arguments["bias"] = draw.normal(image[-1])
            return arguments

        return Case(
            f"{group}: {name}",
            group,
            build,
            torch.Size(shape[:-1]).numel() <= SMALL and shape[-2] * (shape[-2] + shape[-1]) <= 4 * SMALL,
        )

    sizes = (
        (1, 1, 1, 1),
        (2, 3, 1, 3),
        (1, 1, 3, 1),
        (3, 3, 3, 3),
        (2, 113, 5, 4),
        (1, 16, 64, 32),
        (2, 33, 17, 21),
        (5, 7, 40, 8),
        (1, 96, 48, 16),
        (1, 97, 33, 100),
        (1, 3, 113, 7),
        (1, 1023, 3, 2),
    )
    large = ((2, 700, 130, 64), (1, 40, 1023, 513), (3, 196, 256, 256), (1, 20_011, 33, 16), (4, 113, 768, 20))
    for i, shape in enumerate((*sizes, *large)):
        yield case(
            "sizes" if i < len(sizes) else "large",
            "x".join(map(str, shape)),
            shape,
            bias=i % 3 != 0,
            need_weights=i % 2 == 0,
        )
    for shape in ((1, 1, 1), (5, 7, 9), (113, 40, 16), (300, 64, 64)):
        yield case("no positions", "x".join(map(str, shape)), shape, need_weights=True)
    for shape in ((0, 5, 7, 3), (2, 0, 7, 3), (0, 7, 3), (2, 5, 7, 0)):
        yield case("empty", "x".join(map(str, shape)), shape, need_weights=True)
    for make in DENSE:
        yield case("views", make.__name__, (3, 21, 18, 12), make=make, need_weights=True)
        yield case("views", f"weight {make.__name__}", (3, 21, 18, 12), make_weight=make)
    for make_text in (transposed, every_second_channel, window, same_for_all, same_channel):
        yield case("views", f"text {make_text.__name__}", (3, 21, 18, 12), make_text=make_text)
    yield case("options", "large scores", (2, 50, 24, 8), gain=20, need_weights=True)
    yield case("options", "small scores", (2, 50, 24, 8), gain=0.01)
    yield case("extremes", "weight near the largest", (2, 21, 18, 12), make_weight=near_largest, need_weights=True)
