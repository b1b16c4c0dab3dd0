"""channel_attention: with and without positions, weights and bias."""

import functools

from . import Variant

make = functools.partial(
    Variant,
    "channel_attention",
    sizes={"B": 2, "N": 4, "D": 6, "E": 3, "DE": 9},
    tiny={"D": 3, "E": 2, "DE": 5},
    large={"B": 3, "N": 29, "D": 20, "E": 7, "DE": 27},
)

VARIANTS = {
    "channel": make(
        {"image": "B N D", "text": "B E", "weight": "D DE", "bias": "D"},
        options=lambda s: {"need_weights": True},
        main=True,
    ),
    "channel flat": make({"image": "B D", "text": "B E", "weight": "D DE"}),
}
