"""bidirectional_attention: with and without masks on both sides."""

import functools

from support.mistakes import Form

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
    tiny={"d": 3, "dv": 2},
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


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "H": 3, "N": 5, "T": 4, "d": 8, "dv": 6}
POSITIONAL = 4
OPTIONAL = ("image_mask", "text_mask")

INPUTS = {
    "image_query": "B, H, N, d",
    "text_key": "B, H, T, d",
    "image_value": "B, H, N, dv",
    "text_value": "B, H, T, dv",
    "image_mask": "B, N",
    "text_mask": "B, T",
}
FORMS = {"masked": Form(FORM_SIZES, INPUTS)}
GIVEN = FORMS["masked"].arguments
CHANNELLESS = [
    {name: GIVEN[name][..., :0] for name in names}
    for names in (("image_query", "text_key"), ("image_value", "text_value"))
]

MISTAKES = {
    "masked": {
        "image_query without channels": (
            CHANNELLESS[0],
            ValueError,
            ["image_query must have at least one channel (d), got shape [2, 3, 5, 0]"],
        ),
        "image_value without channels": (
            CHANNELLESS[1],
            ValueError,
            ["image_value must have at least one channel (dv), got shape [2, 3, 5, 0]"],
        ),
        "masks exchanged": (
            {"image_mask": GIVEN["text_mask"], "text_mask": GIVEN["image_mask"]},
            ValueError,
            ["image_mask must have shape [B, N] = [2, 5], got [2, 4]"],
        ),
    }
}

KERNELS = {
    "masked": (
        Form(FORM_SIZES, INPUTS, scale=0.5),
        {
            "_backward": {
                "grad_image_out": "B, H, N, dv",
                "grad_text_out": "B, H, T, dv",
                "image_out": "B, H, N, dv",
                "unrounded": "B, H, T, dv",
                "image_softmax": "B, H, 2, N",
                "text_softmax": "B, H, 2, T",
            }
        },
    )
}
WRONG = {"masked": {"queries without channels": CHANNELLESS[0], "values without channels": CHANNELLESS[1]}}
