"""deformable_attention: the same number of points a level and different ones, softmax and given weights, masks."""

import functools

import torch
from support.mistakes import Form, of_layouts

from . import Variant, no_second, some

LEVELS = ((3, 2), (1, 2))
POINTS = (2, 1)
SIZES = {"B": 2, "S": 8, "H": 2, "Q": 3, "L": 2, "P": 2, "K": 3, "d": 5, "two": 2}
TINY = {"Q": 2, "d": 2}
LARGE = {"H": 3, "Q": 13, "d": 24}
make = functools.partial(Variant, "deformable_attention", sizes=SIZES, tiny=TINY, large=LARGE)
SHAPES = {"value": "B S H d", "locations": "B Q H L P two", "scores": "B Q H L P"}
POINTED = {"value": "B S H d", "locations": "B Q H K two", "scores": "B Q H K"}


def of_positions(mask):
    return ~mask[:, :, None, None]


HIDDEN = {"value": ("mask", of_positions)}

VARIANTS = {
    "deformable": make(
        SHAPES, options=lambda s: {"spatial_shapes": LEVELS, "mask": no_second(s.B, s.S)}, hidden=HIDDEN, main=True
    ),
    "deformable points": make(POINTED, options=lambda s: {"spatial_shapes": LEVELS, "points": POINTS}),
    "deformable weights": make(
        POINTED,
        options=lambda s: {
            "spatial_shapes": LEVELS,
            "points": POINTS,
            "mask": some(s.B, s.S),
            "softmax": False,
        },
        hidden=HIDDEN,
    ),
}


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "S": 8, "H": 3, "d": 4, "Q": 5, "L": 2, "P": 4, "K": 3, "E": 12}
POSITIONAL = 4
OPTIONAL = ("mask",)
KNOWN = ("S", "L", "K", "2")  # from spatial_shapes and points

INPUTS = {"value": "B, S, H, d", "locations": "B, Q, H, L, P, 2", "scores": "B, Q, H, L, P", "mask": "B, S"}
POINT_INPUTS = INPUTS | {"locations": "B, Q, H, K, 2", "scores": "B, Q, H, K"}
FORMS = {
    "levels": Form(FORM_SIZES, INPUTS, spatial_shapes=LEVELS),
    "points": Form(FORM_SIZES, POINT_INPUTS, spatial_shapes=LEVELS, points=POINTS),
}
CHANNELLESS = {"value": FORMS["levels"].arguments["value"][..., :0]}


def spatial_shapes(value, exception, *parts):
    return {"spatial_shapes": value}, exception, parts


def points(value, exception, *parts):
    return {"points": value}, exception, parts


MISTAKES = {
    "levels": {
        "value without channels": (
            CHANNELLESS,
            ValueError,
            ["value must have at least one channel (d), got shape [2, 8, 3, 0]"],
        ),
        "spatial_shapes a number": spatial_shapes(3, TypeError, "spatial_shapes must be a sequence of (Y, X), got 3"),
        "spatial_shapes None": spatial_shapes(None, TypeError, "spatial_shapes must be a sequence of (Y, X), got None"),
        "spatial_shapes flat": spatial_shapes(
            [3, 2, 1, 2], TypeError, "spatial_shapes must be a sequence of (Y, X), got [3, 2, 1, 2]"
        ),
        "spatial_shapes of three": spatial_shapes(
            [(3, 2, 1), (1, 2)], ValueError, "spatial_shapes[0] must be (Y, X), got (3, 2, 1)"
        ),
        "spatial_shapes of floats": spatial_shapes(
            [(3, 2), (1, 2.0)], TypeError, "spatial_shapes[1] must be an int, got float"
        ),
        "spatial_shapes of no levels": spatial_shapes([], ValueError, "spatial_shapes must hold at least one level"),
        "spatial_shapes with a zero": spatial_shapes(
            [(4, 2), (0, 2)], ValueError, "spatial_shapes[1] must be sizes of at least 1, got (0, 2)"
        ),
        "spatial_shapes negative": spatial_shapes(
            [(-4, -2), (1, 2)], ValueError, "spatial_shapes[0] must be sizes of at least 1, got (-4, -2)"
        ),
        "spatial_shapes that don't add up": spatial_shapes(
            [(3, 2), (1, 3)],
            ValueError,
            "value must have shape [B, S, H, d] = [any, 9, any, any], got [2, 8, 3, 4]",
            "S is the sum of Y X over spatial_shapes [(3, 2), (1, 3)]",
        ),
        "spatial_shapes of another number of levels": spatial_shapes(
            [(4, 2)], ValueError, "locations must have shape [B, Q, H, L, P, 2] = [2, any, 3, 1, any, 2]"
        ),
        "spatial_shapes a tensor of floats": spatial_shapes(
            torch.tensor(LEVELS).float(),
            ValueError,
            "spatial_shapes must be a sequence of (Y, X) or int64, got torch.f",
        ),
        "spatial_shapes a flat tensor": spatial_shapes(
            torch.tensor(LEVELS).flatten(), ValueError, "spatial_shapes must have shape [L, 2] = [any, 2], got [4]"
        ),
        "spatial_shapes a tensor without values": spatial_shapes(
            torch.tensor(LEVELS, device="meta"), ValueError, "spatial_shapes must be a sequence of (Y, X) where"
        ),
        **{
            what: mistake
            for what, *mistake in of_layouts("spatial_shapes", torch.tensor(LEVELS))
            if "nested" not in what
        },
        "locations in float16 beside bfloat16": (
            {
                "value": FORMS["levels"].arguments["value"].bfloat16(),
                "locations": FORMS["levels"].arguments["locations"].half(),
            },
            ValueError,
            ["locations must have value's dtype torch.bfloat16 or torch.float32, got torch.float16"],
        ),
    },
    "points": {
        "points a number": points(3, TypeError, "points must be a sequence of ints, one a level, got 3"),
        "points of floats": points([2, 1.0], TypeError, "points[1] must be an int, got float"),
        "points of one level": points([3], ValueError, "points must have a count for each of 2 levels, got [3]"),
        "points negative": points([4, -1], ValueError, "points must not be negative, got [4, -1]"),
        "points that don't add up": points(
            [2, 2], ValueError, "locations must have shape [B, Q, H, K, 2] = [2, any, 3, 4, 2], got [2, 5, 3, 3, 2]"
        ),
        "points None": points(
            None, ValueError, "locations must have shape [B, Q, H, L, P, 2] = [2, any, 3, 2, any, 2]"
        ),
    },
}

FLAT = {"spatial_shapes": [n for level in LEVELS for n in level], "points": list(POINTS)}
KERNELS = {
    "points": (
        Form(FORM_SIZES, POINT_INPUTS, **FLAT, softmax=True, deterministic=False),
        {"_backward": {"grad_result": "B, Q, E", "softmax_rows": "B, Q, H, 2"}},
    )
}
for dtype in ("torch.float16", "torch.bfloat16"):  # of the value, beside locations and scores in float32
    KERNELS["points"][0].wider += (("value", dtype),)
WRONG = {
    "points": {
        "value without channels": CHANNELLESS,
        "spatial_shapes of one number": {"spatial_shapes": [8]},
        "spatial_shapes without a level": {"spatial_shapes": [], "points": []},
        "spatial_shapes negative": {"spatial_shapes": [-3, -2, 1, 2]},
        "spatial_shapes that overflow": {"spatial_shapes": [2**62, 4, 4, 2]},
        "spatial_shapes that don't add up": {"spatial_shapes": [3, 2, 1, 1]},
        "points negative": {"points": [4, -1]},
        "points that don't add up": {"points": [2, 2]},
        "points of one level": {"points": [3]},
    }
}
