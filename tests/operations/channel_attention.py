"""channel_attention: with and without positions, weights and bias."""

import functools

from support.mistakes import Form

from . import Variant

make = functools.partial(
    Variant,
    "channel_attention",
    sizes={"B": 2, "N": 4, "D": 6, "E": 3, "DE": 9},
    tiny={"N": 3, "D": 4, "E": 2, "DE": 6},
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


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "N": 6, "D": 8, "E": 5}
POSITIONAL = 4
OPTIONAL = ("bias",)

FORMS = {"positions": Form(FORM_SIZES, {"image": "B, N, D", "text": "B, E", "weight": "D, D + E", "bias": "D"})}
GIVEN = FORMS["positions"].arguments

MISTAKES = {
    "positions": {
        # six samples without positions
        **{
            f"image {what}": (
                {"image": GIVEN["image"][0]},
                ValueError,
                [
                    "text must have shape [B, E] = [6, any], got [2, 5]: image [B, D] has no positions, one sample's [N, D] is image[None]"
                ],
            )
            for what in ("too flat", "of one sample")
        },
        "image of one dimension": (
            {"image": GIVEN["image"][0, 0]},
            ValueError,
            ["image must have shape [B, N, D] = [any, any, any], got [8]"],
        ),
        "image without channels": (
            {"image": GIVEN["image"][..., :0]},
            ValueError,
            ["image must have at least one channel (D), got shape [2, 6, 0]"],
        ),
        "weight turned": (
            {"weight": GIVEN["weight"].T},
            ValueError,
            ["weight must have shape [D, D + E] = [8, 13], got [13, 8]"],
        ),
        "weight of the image alone": (
            {"weight": GIVEN["weight"][:, :8]},
            ValueError,
            ["weight must have shape [D, D + E] = [8, 13], got [8, 8]"],
        ),
    }
}

KERNELS = {
    "weights": (
        Form(
            FORM_SIZES | {"R": 5},
            {"image": "B, N, D", "text": "B, E", "weight": "D, D + E", "bias": "D"},
            need_weights=True,
            kept_rows=5,
        ),
        {"_backward": {"grad_result": "B, N, D", "grad_weights": "B, N, D", "kept": "R, D"}},
    )
}
KERNEL_GIVEN = KERNELS["weights"][0].arguments
WRONG = {
    "weights": {
        "nothing has channels": {
            "image": KERNEL_GIVEN["image"][..., :0],
            "weight": KERNEL_GIVEN["weight"][:0, :5],
            "bias": KERNEL_GIVEN["bias"][:0],
        },
        "fewer rows than none": {"kept_rows": -1},
        "more rows than there are": {"kept_rows": 13},
        "far more": {"kept_rows": 2**62},
    }
}
