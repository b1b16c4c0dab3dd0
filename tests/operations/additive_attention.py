"""additive_attention: with and without query, gate and biases; bags; both ways to combine."""

import functools

import torch

from . import Variant, no_second, of_rows, some

LAYERS = {"w_image": "A D", "v": "K A", "bias": "A"}
GATE = {"w_gate": "A D", "bias_gate": "A"}
QUERY = {"query": "B E", "w_query": "A E"}
NO_QUERY = {"query": None, "w_query": None}
SIZES = {"B": 2, "N": 4, "D": 6, "A": 7, "E": 3, "K": 2, "bags": 3}

TINY = {"D": 3, "A": 3, "E": 2}
LARGE = {"B": 3, "N": 29, "D": 20, "A": 23, "E": 5}
make = functools.partial(
    Variant, "additive_attention", sizes=SIZES, tiny=TINY, large=LARGE, hidden={"image": ("mask", of_rows)}
)


def bags(s):
    """The second is empty."""
    return torch.tensor([0, 3, 3, s.N])


VARIANTS = {
    "additive": make(
        {"image": "B N D"} | QUERY | LAYERS | GATE,
        options=lambda s: {"mask": some(s.B, s.N), "need_weights": True},
        main=True,
    ),
    "additive multiply": make(
        {"image": "B N D", "w_image": "A D", "v": "K A"},
        sizes=SIZES | {"K": 1},
        options=lambda s: NO_QUERY | {"combine": "multiply", "activation": "gelu", "mask": no_second(s.B, s.N)},
    ),
    "additive multiply weights": make(
        {"image": "B N D"} | QUERY | LAYERS,
        sizes=SIZES | {"K": 1},
        options=lambda s: {"combine": "multiply", "need_weights": True},
        hidden={},
    ),
    "additive packed": make(
        {"image": "N D"} | LAYERS | GATE,
        main=True,
        sizes=SIZES | {"N": 8},
        options=lambda s: NO_QUERY | {"offsets": bags(s), "mask": some(s.N), "need_weights": True},
    ),
    "additive packed query": make(
        {"image": "N D", "query": "bags E", "w_query": "A E"} | LAYERS,
        sizes=SIZES | {"N": 8, "K": 1},
        options=lambda s: {"offsets": bags(s), "combine": "multiply", "activation": "gelu"},
        hidden={},
    ),
}
