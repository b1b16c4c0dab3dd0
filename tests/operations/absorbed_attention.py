"""absorbed_attention: both results, either alone, with and without masks."""

import functools

from support.mistakes import Form

from . import Variant, no_second, of_planes, of_rows, of_tokens, some

SHAPES = {"image": "B N D", "key": "B H T D", "value": "B H T Dv", "key_bias": "B H T"}
POOLED = {name: SHAPES[name] for name in ("image", "key")}
make = functools.partial(
    Variant,
    "absorbed_attention",
    sizes={"B": 2, "H": 2, "N": 4, "T": 3, "D": 5, "Dv": 6},
    tiny={"N": 3, "D": 2, "Dv": 2},
    large={"H": 3, "N": 13, "T": 11, "D": 24, "Dv": 18},
)


def masks(s):
    return {"image_mask": some(s.B, s.N), "text_mask": no_second(s.B, s.T)}


HIDDEN = {
    "image": ("image_mask", of_rows),
    "key": ("text_mask", of_tokens),
    "value": ("text_mask", of_tokens),
    "key_bias": ("text_mask", of_planes),
}

VARIANTS = {
    "absorbed": make(SHAPES, options=masks, hidden=HIDDEN, main=True),
    "absorbed plain": make(SHAPES),
    "absorbed pool": make(POOLED, options=lambda s: {"image_mask": no_second(s.B, s.N)}),
    "absorbed image": make(SHAPES, options=lambda s: {"text_mask": some(s.B, s.T), "pool": False}),
}


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "H": 3, "N": 5, "T": 4, "D": 8, "Dv": 6}
POSITIONAL = 3
OPTIONAL = ("value", "key_bias", "image_mask", "text_mask")

INPUTS = {
    "image": "B, N, D",
    "key": "B, H, T, D",
    "value": "B, H, T, Dv",
    "key_bias": "B, H, T",
    "image_mask": "B, N",
    "text_mask": "B, T",
}
FORMS = {"masked": Form(FORM_SIZES, INPUTS)}
GIVEN = FORMS["masked"].arguments
CHANNELLESS = [
    {name: GIVEN[name][..., :0] for name in ("image", "key")},
    {"value": GIVEN["value"][..., :0]},
]

MISTAKES = {
    "masked": {
        "image without channels": (
            CHANNELLESS[0],
            ValueError,
            ["image must have at least one channel (D), got shape [2, 5, 0]"],
        ),
        "value without channels": (
            CHANNELLESS[1],
            ValueError,
            ["value must have at least one channel (Dv), got shape [2, 3, 4, 0]"],
        ),
        "masks exchanged": (
            {"image_mask": GIVEN["text_mask"], "text_mask": GIVEN["image_mask"]},
            ValueError,
            ["image_mask must have shape [B, N] = [2, 5], got [2, 4]"],
        ),
        "no result": (
            {"value": None, "pool": False},
            ValueError,
            ["value must be given with pool=False, got None: no result is wanted"],
        ),
        "pool a tensor": ({"pool": GIVEN["text_mask"]}, TypeError, ["pool must be a bool, got Tensor"]),
        "key in float32 beside value in bfloat16": (
            {"image": GIVEN["image"].bfloat16(), "value": GIVEN["value"].bfloat16(), "key_bias": None},
            ValueError,
            ["value must have key's dtype torch.float32, got torch.bfloat16"],
        ),
        "key in float16 beside an image in bfloat16": (
            {"image": GIVEN["image"].bfloat16(), "key": GIVEN["key"].half()},
            ValueError,
            ["key must have image's dtype torch.bfloat16 or torch.float32, got torch.float16"],
        ),
    }
}

KERNELS = {
    "masked": (
        Form(FORM_SIZES, INPUTS, pool=True),
        {
            "_backward": {
                "grad_image_out": "B, N, Dv",
                "grad_text_out": "B, H, T, D",
                "unrounded": "B, H, T, D",
                "image_softmax": "B, H, 2, N",
                "text_softmax": "B, H, 2, T",
            }
        },
    )
}
for dtype in ("torch.float16", "torch.bfloat16"):  # of the image, beside text in float32
    KERNELS["masked"][0].wider += (("image", dtype),)
WRONG = {
    "masked": {
        "image without channels": CHANNELLESS[0],
        "value without channels": CHANNELLESS[1],
        "no result": {"value": None, "pool": False},
    }
}
