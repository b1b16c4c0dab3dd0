"""additive_attention: with and without query, gate and biases; bags; both ways to combine."""

import functools

import torch
from support.mistakes import BAG_SIZES, BAGS, WRONG_OFFSETS, Form

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
    "additive scores": make(
        {"image": "B N D"} | LAYERS | GATE,
        options=lambda s: NO_QUERY | {"need_weights": True, "need_scores": True},
        hidden={},
    ),
    "additive packed scores": make(
        {"image": "N D"} | LAYERS,
        sizes=SIZES | {"N": 8},
        options=lambda s: NO_QUERY | {"offsets": bags(s), "need_scores": True},
        hidden={},
    ),
    "additive packed query": make(
        {"image": "N D", "query": "bags E", "w_query": "A E"} | LAYERS,
        sizes=SIZES | {"N": 8, "K": 1},
        options=lambda s: {"offsets": bags(s), "combine": "multiply", "activation": "gelu"},
        hidden={},
    ),
}


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "N": 6, "D": 8, "E": 5, "A": 7, "K": 1}
POSITIONAL = 5
OPTIONAL = ("query", "w_query", "bias", "w_gate", "bias_gate", "mask")

FORM_LAYERS = {
    "w_image": "A, D",
    "query": "B, E",
    "w_query": "A, E",
    "v": "K, A",
    "bias": "A",
    "w_gate": "A, D",
    "bias_gate": "A",
}
FORMS = {
    "batch": Form(FORM_SIZES, {"image": "B, N, D", **FORM_LAYERS, "mask": "B, N"}),
    "packed": Form(FORM_SIZES | BAG_SIZES, {"image": "rows, D", **FORM_LAYERS, "mask": "rows"}, offsets=BAGS),
}
GIVEN = FORMS["batch"].arguments

MISTAKES = {
    "batch": {
        "image without channels": (
            {"image": GIVEN["image"][..., :0]},
            ValueError,
            ["image must have at least one channel (D), got shape [2, 6, 0]"],
        ),
        "image not packed": (
            {"offsets": BAGS},
            ValueError,
            ["image must have shape [rows, D] = [any, any], got [2, 6, 8]"],
        ),
        "w_image without rows": (
            {"w_image": GIVEN["w_image"][:0]},
            ValueError,
            ["w_image must have at least one row (A), got shape [0, 8]"],
        ),
        "query None": ({"query": None}, ValueError, ["query must be given with w_query (or both be None), got None"]),
        "w_query None": (
            {"w_query": None},
            ValueError,
            ["w_query must be given with query (or both be None), got None"],
        ),
        "v without rows": ({"v": GIVEN["v"][:0]}, ValueError, ["v must have at least one row (K), got shape [0, 7]"]),
        "v of two maps": (
            {"v": torch.randn(2, 7), "combine": "multiply"},
            ValueError,
            ["v must have one row (K = 1) with combine='multiply', got shape [2, 7]"],
        ),
        "w_gate None": ({"w_gate": None}, ValueError, ["w_gate must be given with bias_gate, got None"]),
        "activation unknown": (
            {"activation": "sigmoid"},
            ValueError,
            ["activation must be one of 'tanh', 'relu', 'gelu', got 'sigmoid'"],
        ),
        "activation a function": (
            {"activation": torch.tanh},
            TypeError,
            ["activation must be a str, got builtin_function_or_method"],
        ),
        "dropout_p too large": ({"dropout_p": 1.5}, ValueError, ["dropout_p must be from 0 to 1, got 1.5"]),
        "dropout_p negative": ({"dropout_p": -0.1}, ValueError, ["dropout_p must be from 0 to 1, got -0.1"]),
        "dropout_p NaN": ({"dropout_p": float("nan")}, ValueError, ["dropout_p must be from 0 to 1, got nan"]),
        "dropout_p a tensor": ({"dropout_p": torch.tensor(0.5)}, TypeError, ["dropout_p must be a number, got Tensor"]),
        "combine unknown": ({"combine": "add"}, ValueError, ["combine must be one of 'pool', 'multiply', got 'add'"]),
    },
    "packed": {
        "mask of a batch": ({"mask": GIVEN["mask"]}, ValueError, ["mask must have shape [rows] = [6], got [2, 6]"]),
    },
}

LAYER = {"query": "B, E", "w_image": "A, D", "w_query": "A, E", "v": "K, A", "bias": "A"}
INPUTS = LAYER | {"w_gate": "A, D", "bias_gate": "A"}
KEPT = {"R": 0}  # no rows' products are kept: kept is empty
KERNELS = {
    "pool": (
        Form(
            FORM_SIZES | KEPT | {"K": 3},
            {"image": "B, N, D", **INPUTS, "mask": "B, N"},
            offsets=None,
            seed=None,
            activation=0,
            pool=True,
            dropout_p=0.0,
            need_scores=True,
            kept_rows=0,
        ),
        {
            "_backward": {
                "grad_result": "B, K, D",
                "grad_weights": "B, K, N",
                "grad_scores": "B, K, N",
                "weights": "B, K, N",
                "kept": "R, A + A",
            }
        },
    ),
    "multiply": (
        Form(
            FORM_SIZES | KEPT,
            {"image": "B, N, D", **INPUTS, "mask": "B, N"},
            offsets=None,
            seed=None,
            activation=1,
            pool=False,
            dropout_p=0.0,
            need_scores=True,
            kept_rows=0,
        ),
        {
            "_backward": {
                "grad_result": "B, N, D",
                "grad_weights": "B, K, N",
                "grad_scores": "B, K, N",
                "weights": "B, K, N",
                "kept": "R, A + A",
            }
        },
    ),
    "packed": (
        Form(
            FORM_SIZES | BAG_SIZES | KEPT | {"K": 2},
            {"image": "rows, D", **INPUTS, "mask": "rows"},
            offsets=BAGS,
            seed=None,
            activation=2,
            pool=True,
            dropout_p=0.0,
            need_scores=True,
            kept_rows=0,
        ),
        {
            "_backward": {
                "grad_result": "B, K, D",
                "grad_weights": "K, rows",
                "grad_scores": "K, rows",
                "weights": "K, rows",
                "kept": "R, A + A",
            }
        },
    ),
    "kept": (
        Form(
            FORM_SIZES | {"R": 5},
            {"image": "B, N, D", **LAYER},
            w_gate=None,
            bias_gate=None,
            mask=None,
            offsets=None,
            seed=None,
            activation=0,
            pool=True,
            dropout_p=0.0,
            need_scores=True,
            kept_rows=5,
        ),
        {
            "_backward": {
                "grad_result": "B, K, D",
                "grad_weights": "B, K, N",
                "grad_scores": "B, K, N",
                "weights": "B, K, N",
                "kept": "R, A",
            }
        },
    ),
}
KERNEL_GIVEN = KERNELS["pool"][0].arguments
WRONG = {
    "pool": {
        "w_query without query": {"query": None},
        "query without w_query": {"w_query": None},
        "bias_gate without w_gate": {"w_gate": None},
        "activation unknown": {"activation": 3},
        "activation negative": {"activation": -1},
        "activation far": {"activation": 2**32},
        "three maps multiplied": {"pool": False},
        "offsets with a batch": {"offsets": BAGS},
        "dropout without a seed": {"dropout_p": 0.5},
        "a seed without dropout": {"seed": torch.tensor(3)},
        "dropout of less than nothing": {"seed": torch.tensor(3), "dropout_p": -0.5},
        "dropout of more than all": {"seed": torch.tensor(3), "dropout_p": 1.5},
        "dropout of NaN": {"seed": torch.tensor(3), "dropout_p": float("nan")},
        "a seed of 32 bits": {"seed": torch.tensor(3, dtype=torch.int32), "dropout_p": 0.5},
        "two seeds": {"seed": torch.tensor([3, 4]), "dropout_p": 0.5},
        "no channels": {name: KERNEL_GIVEN[name][..., :0] for name in ("image", "w_image", "w_gate")},
        "no maps": {"v": KERNEL_GIVEN["v"][:0]},
        "no hidden layer": {
            "w_image": KERNEL_GIVEN["w_image"][:0],
            "w_query": KERNEL_GIVEN["w_query"][:0],
            "v": KERNEL_GIVEN["v"][:, :0],
            "bias": KERNEL_GIVEN["bias"][:0],
            "w_gate": KERNEL_GIVEN["w_gate"][:0],
            "bias_gate": KERNEL_GIVEN["bias_gate"][:0],
        },
    },
    "multiply": {"two maps": {"v": torch.randn(2, 7)}, "no maps": {"v": torch.randn(0, 7)}},
    "packed": WRONG_OFFSETS,
    "kept": {
        "fewer rows than none": {"kept_rows": -1},
        "more rows than there are": {"kept_rows": 13},
        "far more": {"kept_rows": 2**62},
    },
}
