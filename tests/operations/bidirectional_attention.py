"""bidirectional_attention: with and without masks on both sides."""

import functools

from . import Variant, no_second, of_tokens, some

SHAPES = {
    "image_query": "B H N d",
    "text_key": "B H T d",
    "image_value": "B H N dv",
    "text_value": "B H T dv",
}
make = functools.partial(
    Variant,
    "bidirectional_attention",
    SHAPES,
    sizes={"B": 2, "H": 2, "N": 4, "T": 3, "d": 5, "dv": 6},
    tiny={"N": 3, "d": 2, "dv": 2},
    large={"H": 3, "N": 13, "T": 11, "d": 24, "dv": 18},
)

VARIANTS = {
    "bidirectional": make(
        options=lambda s: {"image_mask": some(s.B, s.N), "text_mask": no_second(s.B, s.T)},
        hidden={
            "image_query": ("image_mask", of_tokens),
            "image_value": ("image_mask", of_tokens),
            "text_key": ("text_mask", of_tokens),
            "text_value": ("text_mask", of_tokens),
        },
        main=True,
    ),
    "bidirectional plain": make(options=lambda s: {"scale": 0.3}),
}
