"""channel_attention: see the package."""

from . import Form

SIZES = {"B": 2, "N": 6, "D": 8, "E": 5}
POSITIONAL = 4
OPTIONAL = ("bias",)

FORMS = {"positions": Form(SIZES, {"image": "B, N, D", "text": "B, E", "weight": "D, D + E", "bias": "D"})}
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
        Form(SIZES | {"R": 5}, {"image": "B, N, D", "shift": "B, D", "weight": "D, D"}, need_weights=True, kept_rows=5),
        {"_backward": {"grad_result": "B, N, D", "grad_weights": "B, N, D", "kept": "R, D"}},
    )
}
GIVEN = KERNELS["weights"][0].arguments
WRONG = {
    "weights": {
        "nothing has channels": {
            "image": GIVEN["image"][..., :0],
            "shift": GIVEN["shift"][..., :0],
            "weight": GIVEN["weight"][:0, :0],
        },
        "fewer rows than none": {"kept_rows": -1},
        "more rows than there are": {"kept_rows": 13},
        "far more": {"kept_rows": 2**62},
    }
}
