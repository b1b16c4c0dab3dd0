"""spatial_attention: layouts, bags, both ways to combine."""

import functools

import torch
from support.mistakes import BAG_SIZES, BAGS, WRONG_OFFSETS, Form, of_layouts

from . import Variant, no_second, of_planes, of_rows, some

ROWS = {"image": "B N D", "text": "B D"}
PLANES = {"image": "B D Y X", "text": "B D"}
PACKED = {"image": "N D", "text": "bags D"}
SIZES = {"B": 2, "N": 4, "D": 6, "Y": 2, "X": 3, "bags": 3}
LARGE = {"B": 3, "N": 30, "D": 24, "Y": 5, "X": 6}

make = functools.partial(Variant, "spatial_attention", sizes=SIZES, tiny={"N": 5}, large=LARGE)
rows = functools.partial(make, ROWS, hidden={"image": ("mask", of_rows)})
planes = functools.partial(make, PLANES, hidden={"image": ("mask", of_planes)})
packed = functools.partial(make, PACKED, sizes=SIZES | {"N": 8}, tiny={"N": 10}, hidden={"image": ("mask", of_rows)})


def bags(s):
    """The second is empty."""
    return torch.tensor([0, 3, 3, s.N])


VARIANTS = {
    "spatial": rows(
        options=lambda s: {"num_heads": 2, "mask": some(s.B, s.N), "need_weights": True},
        main=True,
    ),
    "spatial plain": rows(hidden={}),
    "spatial pool": rows(options=lambda s: {"combine": "pool", "mask": no_second(s.B, s.N), "need_weights": True}),
    "spatial scale": rows(options=lambda s: {"scale": 0.7, "combine": "pool"}, hidden={}),
    "spatial planes": planes(options=lambda s: {"layout": "bdhw", "rescale": True, "mask": no_second(s.B, s.Y, s.X)}),
    "spatial planes pool": planes(
        options=lambda s: {"layout": "bdhw", "combine": "pool", "num_heads": 2, "rescale": True}, hidden={}
    ),
    "spatial packed": packed(options=lambda s: {"offsets": bags(s), "mask": some(s.N), "need_weights": True}),
    "spatial packed pool": packed(
        main=True, options=lambda s: {"offsets": bags(s), "combine": "pool", "num_heads": 2, "mask": some(s.N)}
    ),
}


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "N": 6, "Y": 2, "X": 3, "D": 8}
POSITIONAL = 2
OPTIONAL = ("mask",)

FORMS = {
    "positions": Form(FORM_SIZES, {"image": "B, N, D", "text": "B, D", "mask": "B, N"}),
    "planes": Form(FORM_SIZES, {"image": "B, D, Y, X", "text": "B, D", "mask": "B, Y, X"}, layout="bdhw"),
    "packed": Form(FORM_SIZES | BAG_SIZES, {"image": "rows, D", "text": "B, D", "mask": "rows"}, offsets=BAGS),
}
GIVEN = FORMS["positions"].arguments
GIVEN_PLANES = FORMS["planes"].arguments
IMAGE, TEXT = GIVEN["image"], GIVEN["text"]

MISTAKES = {
    "positions": {
        "image without channels": (
            {"image": IMAGE[..., :0], "text": TEXT[:, :0]},
            ValueError,
            ["image must have at least one channel (D), got shape [2, 6, 0]"],
        ),
        "image not planes": (
            {"layout": "bdhw"},
            ValueError,
            ["image must have shape [B, D, Y, X] = [any, any, any, any], got [2, 6, 8]"],
        ),
        "image not packed": (
            {"offsets": BAGS},
            ValueError,
            ["image must have shape [rows, D] = [any, any], got [2, 6, 8]"],
        ),
        "num_heads a float": ({"num_heads": 2.0}, TypeError, ["num_heads must be an int, got float"]),
        "num_heads a bool": ({"num_heads": True}, TypeError, ["num_heads must be an int, got bool"]),
        "num_heads None": ({"num_heads": None}, TypeError, ["num_heads must be an int, got NoneType"]),
        **{
            f"num_heads {count}": (
                {"num_heads": count},
                ValueError,
                [f"num_heads must be at least 1 and divide image's D = 8, got {count}"],
            )
            for count in (0, -2, 3, 16)
        },
        "combine unknown": ({"combine": "add"}, ValueError, ["combine must be one of 'multiply', 'pool', got 'add'"]),
        "layout unknown": ({"layout": "bhwd"}, ValueError, ["layout must be one of 'bnd', 'bdhw', got 'bhwd'"]),
        "out a list": ({"out": []}, TypeError, ["out must be a torch.Tensor, got list"]),
        **{what: mistake for what, *mistake in of_layouts("out", torch.zeros(2, 6, 8))},
        "mask of one sample": (
            {"image": IMAGE[:1], "text": TEXT[:1], "mask": GIVEN["mask"][0]},
            ValueError,
            ["mask must have shape [B, N] = [1, 6], got [6]: one sample without a batch is mask[None]"],
        ),
        "out turned": (
            {"out": torch.empty(2, 8, 6)},
            ValueError,
            ["out must have the result's shape [2, 6, 8], got [2, 8, 6]"],
        ),
        "out of the pooled shape": (
            {"out": torch.empty(2, 8)},
            ValueError,
            ["out must have the result's shape [2, 6, 8], got [2, 8]"],
        ),
        "out of the image's shape": (
            {"combine": "pool", "out": torch.empty(2, 6, 8)},
            ValueError,
            ["out must have the result's shape [2, 8], got [2, 6, 8]"],
        ),
        "out of another dtype": (
            {"out": IMAGE.half()},
            ValueError,
            ["out must have image's dtype torch.float32, got torch.float16"],
        ),
        "out elsewhere": ({"out": IMAGE.to("meta")}, ValueError, ["out must be on image's device cpu, got meta"]),
        "out overlaps itself": (
            {"out": torch.empty(2, 1, 8).expand(2, 6, 8)},
            ValueError,
            ["out must not overlap itself, got strides (8, 0, 1) for shape [2, 6, 8]"],
        ),
        "out requires a gradient": (
            {"out": torch.zeros(2, 6, 8, requires_grad=True)},
            ValueError,
            ["out is for inference only", "requires a gradient"],
        ),
        "image requires a gradient": (
            {"image": IMAGE.clone().requires_grad_(), "out": torch.empty(2, 6, 8)},
            ValueError,
            ["out is for inference only", "requires a gradient"],
        ),
        "text requires a gradient": (
            {"text": TEXT.clone().requires_grad_(), "out": torch.empty(2, 6, 8)},
            ValueError,
            ["out is for inference only", "requires a gradient"],
        ),
    },
    "planes": {
        "mask of positions": (
            {"mask": GIVEN["mask"]},
            ValueError,
            ["mask must have shape [B, Y, X] = [2, 2, 3], got [2, 6]"],
        ),
        "mask turned": (
            {"mask": GIVEN_PLANES["mask"].mT},
            ValueError,
            ["mask must have shape [B, Y, X] = [2, 2, 3], got [2, 3, 2]"],
        ),
        "offsets, too": (
            {"offsets": BAGS},
            ValueError,
            ["layout must be 'bnd' with offsets (image is packed [rows, D]), got 'bdhw'"],
        ),
    },
    "packed": {
        "mask of a batch": ({"mask": GIVEN["mask"]}, ValueError, ["mask must have shape [rows] = [6], got [2, 6]"]),
        "out of the pooled shape": (
            {"out": torch.empty(3, 8)},
            ValueError,
            ["out must have the result's shape [6, 8], got [3, 8]"],
        ),
    },
}


def kernel(sizes, inputs, weights, pool, offsets=None):
    """The form, and what the other functions get besides."""
    result = "B, D" if pool else inputs["image"]
    return (
        Form(sizes | {"H": 2}, inputs, offsets=offsets, scale=1.0, num_heads=2, pool=pool, rescale=True),
        {"_out": {"out": result}, "_backward": {"grad_result": result, "grad_weights": weights, "weights": weights}},
    )


KERNELS = {
    "positions": kernel(FORM_SIZES, {"image": "B, N, D", "text": "B, D", "mask": "B, N"}, "B, H, N", False),
    "pool": kernel(FORM_SIZES, {"image": "B, N, D", "text": "B, D", "mask": "B, N"}, "B, H, N", True),
    "planes": kernel(
        FORM_SIZES | {"N": 6}, {"image": "B, D, Y, X", "text": "B, D", "mask": "B, Y, X"}, "B, H, N", False
    ),
    "packed": kernel(
        FORM_SIZES | BAG_SIZES, {"image": "rows, D", "text": "B, D", "mask": "rows"}, "H, rows", False, BAGS
    ),
}
HEADS = {f"num_heads {count}": {"num_heads": count} for count in (0, -1, 3, 16, 2**32)}
WRONG = {
    "positions": HEADS
    | {
        "offsets, too": {"offsets": BAGS},
        "no channels": {"image": IMAGE[..., :0], "text": TEXT[:, :0]},
        "five dimensions": {"image": GIVEN_PLANES["image"][None]},
    },
    "pool": HEADS,
    "packed": WRONG_OFFSETS | HEADS,
}
