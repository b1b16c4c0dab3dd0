"""bidirectional_attention: see the package."""

from . import Form

SIZES = {"B": 2, "H": 3, "N": 5, "T": 4, "d": 8, "dv": 6}
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
FORMS = {"masked": Form(SIZES, INPUTS)}
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
        Form(SIZES, INPUTS, scale=0.5),
        {
            "_backward": {
                "grad_image_out": "B, H, N, dv",
                "grad_text_out": "B, H, T, dv",
                "image_out": "B, H, N, dv",
                "text_out": "B, H, T, dv",
                "image_softmax": "B, H, 2, N",
                "text_softmax": "B, H, 2, T",
            }
        },
    )
}
WRONG = {"masked": {"queries without channels": CHANNELLESS[0], "values without channels": CHANNELLESS[1]}}
