"""Mistakes in the modules: in what they are made of, told by the constructor, and in what they are called with."""

import inspect

import torch

import mmkernels as mmk

from .mistakes import of_layouts, of_options

# The arguments that are needed.
MADE_OF = {
    "SpatialAttention": {"image_dim": 8, "text_dim": 5},
    "GatedCrossAttention": {"image_dim": 8, "text_dim": 5},
    "BidirectionalAttention": {"image_dim": 8, "text_dim": 5, "embed_dim": 12, "num_heads": 2},
    "ChannelAttention": {"image_dim": 8, "text_dim": 5},
    "AdditiveAttention": {"image_dim": 8, "hidden_dim": 7},
    "AttentionPooling": {"image_dim": 8, "num_heads": 2},
    "DeformableAttention": {"embed_dim": 8, "num_heads": 2, "num_levels": 2, "num_points": 3},
}
DIMENSIONS = (
    "image_dim",
    "text_dim",
    "embed_dim",
    "value_dim",
    "hidden_dim",
    "query_dim",
    "num_queries",
    "out_dim",
    "num_levels",
)
# PyTorch tells mistakes in these.
ELSEWHERE = {"device", "dtype"}

FURTHER = {
    "SpatialAttention": {
        "num_heads 3": ({"num_heads": 3}, ValueError, "num_heads must be at least 1 and divide image_dim = 8, got 3")
    },
    "GatedCrossAttention": {
        "num_heads 4 of queries": (
            {"num_heads": 4, "embed_dim": 6},
            ValueError,
            "num_heads must be at least 1 and divide embed_dim = 6, got 4",
        ),
        "num_heads 4 of values": (
            {"num_heads": 4, "value_dim": 6},
            ValueError,
            "num_heads must be at least 1 and divide value_dim = 6, got 4",
        ),
        "gate_activation a name": (
            {"gate_activation": "relu"},
            TypeError,
            "gate_activation must be a module or None, got str",
        ),
        "norm a flag": ({"norm": True}, TypeError, "norm must be a module or None, got bool"),
    },
    "BidirectionalAttention": {
        "num_heads 5": ({"num_heads": 5}, ValueError, "num_heads must be at least 1 and divide embed_dim = 12, got 5")
    },
    "AdditiveAttention": {
        "dropout too large": ({"dropout": 1.5}, ValueError, "dropout must be from 0 to 1, got 1.5"),
        "dropout a flag": ({"dropout": True}, TypeError, "dropout must be a number, got bool"),
        "maps multiplied": (
            {"num_queries": 2, "combine": "multiply"},
            ValueError,
            "num_queries must be 1 with combine='multiply', got 2",
        ),
        "combine of SpatialAttention": (
            {"combine": "sum"},
            ValueError,
            "combine must be one of 'pool', 'multiply', got 'sum'",
        ),
    },
    "DeformableAttention": {
        "num_heads 3": ({"num_heads": 3}, ValueError, "num_heads must be at least 1 and divide embed_dim = 8, got 3"),
        "num_points 0": ({"num_points": 0}, ValueError, "num_points must be at least 1, got 0"),
        "num_points a float": ({"num_points": 2.0}, TypeError, "num_points must be an int, got float"),
        "num_points of one level": (
            {"num_points": [3]},
            ValueError,
            "num_points must have a number for each of 2 levels, got [3]",
        ),
        "num_points of no point": ({"num_points": (3, 0)}, ValueError, "num_points[1] must be at least 1, got 0"),
    },
    "AttentionPooling": {
        "num_heads 3": ({"num_heads": 3}, ValueError, "num_heads must be at least 1 and divide embed_dim = 8, got 3"),
        "queries learned and given": (
            {"num_queries": 2, "query_dim": 5},
            ValueError,
            "num_queries must be 1 with query_dim=5: they are given, got 2",
        ),
    },
}


def of_constructor(name):
    """(what, changed arguments, exception, message parts)"""
    module = getattr(mmk, name)
    yield from of_options(module)
    for argument, parameter in inspect.signature(module).parameters.items():
        if argument == "absorb":
            for value in (1, "True"):
                yield (
                    f"absorb {value!r}",
                    {"absorb": value},
                    TypeError,
                    [f"absorb must be None, True or False, got {type(value).__name__} {value!r}"],
                )
        if argument not in (*DIMENSIONS, "num_heads"):
            continue
        for value in (2.0, True, "8", torch.tensor(8), *([] if parameter.default is None else [None])):
            yield (
                f"{argument} {value!r}",
                {argument: value},
                TypeError,
                [f"{argument} must be an int, got {type(value).__name__}"],
            )
        for value in (0, -2):
            yield (
                f"{argument} {value}",
                {argument: value},
                ValueError,
                [f"{argument} must be at least 1", f"got {value}"],
            )
    for what, (changes, exception, message) in FURTHER.get(name, {}).items():
        yield what, changes, exception, [message]


# Calls: what the module is made of besides, and valid tensors.
IMAGE = torch.randn(3, 6, 8)
TEXT = torch.randn(3, 5)
TOKENS = torch.randn(3, 4, 5)
OFFSETS = torch.tensor([0, 2, 3, 6])
CALLS = {
    "spatial": ("SpatialAttention", {}, {"image": IMAGE, "text": TEXT}),
    "planes": ("SpatialAttention", {"layout": "bdhw"}, {"image": IMAGE.mT.unflatten(2, (2, 3)), "text": TEXT}),
    "spatial packed": ("SpatialAttention", {}, {"image": IMAGE[0], "text": TEXT, "offsets": OFFSETS}),
    "gated": ("GatedCrossAttention", {}, {"image": IMAGE, "text": TOKENS}),
    "bidirectional": ("BidirectionalAttention", {}, {"image": IMAGE, "text": TOKENS}),
    "channel": ("ChannelAttention", {}, {"image": IMAGE, "text": TEXT}),
    "additive": ("AdditiveAttention", {}, {"image": IMAGE}),
    "additive of a query": ("AdditiveAttention", {"query_dim": 5}, {"image": IMAGE, "query": TEXT}),
    "pooling": ("AttentionPooling", {}, {"image": IMAGE}),
    "deformable": (
        "DeformableAttention",
        {},
        {
            "query": torch.randn(3, 4, 8),
            "image": IMAGE,
            "reference_points": torch.rand(3, 4, 2, 2),
            "spatial_shapes": ((2, 2), (1, 2)),
        },
    ),
    "pooling of a query": ("AttentionPooling", {"query_dim": 5}, {"image": IMAGE, "query": TOKENS}),
    "additive packed": ("AdditiveAttention", {"query_dim": 5}, {"image": IMAGE[0], "query": TEXT, "offsets": OFFSETS}),
}


def module(kind):
    name, options, _ = CALLS[kind]
    return getattr(mmk, name)(**MADE_OF[name] | options)


def of_projections(kind):
    """What doesn't fit a plain projection: PyTorch's errors would name neither the argument nor the projection.
    SpatialAttention's image is given to none, ChannelAttention's projection to image and text together."""
    name, _, given = CALLS[kind]
    for argument, tensor in given.items():
        unprojected = argument in ("offsets", "reference_points", "spatial_shapes")
        if name != "ChannelAttention" and not unprojected and (name, argument) != ("SpatialAttention", "image"):
            yield from of_projection(name, argument, tensor)


def of_projection(name, argument, tensor):
    weight = "projection.weight's "
    yield (
        f"{argument} in float64",
        {argument: tensor.double()},
        ValueError,
        [f"{argument} must have ", f"{weight}dtype torch.float32, got torch.float64"],
    )
    yield (
        f"{argument} elsewhere",
        {argument: tensor.to("meta")},
        ValueError,
        [f"{argument} must be on ", f"{weight}device cpu, got meta"],
    )
    if (name, argument) == ("AdditiveAttention", "image"):
        return  # told below
    yield (
        f"{argument} of too few channels",
        {argument: tensor[..., 1:]},
        ValueError,
        [f"{argument} must have ", " channels for ", f"got shape {list(tensor[..., 1:].shape)}"],
    )


def of_call(kind):
    name, _, given = CALLS[kind]
    for argument, tensor in given.items():
        if argument in ("offsets", "spatial_shapes"):
            continue
        for value in (None, [[1.0]]):
            if value is not None or argument != "query":
                yield (
                    f"{argument} {value}",
                    {argument: value},
                    TypeError,
                    [f"{argument} must be a torch.Tensor, got {type(value).__name__}"],
                )
        yield (
            f"{argument} of integers",
            {argument: tensor.long()},
            ValueError,
            [f"{argument} must be float32", "got torch.int64"],
        )
        yield from of_layouts(argument, tensor)
        yield (
            f"{argument} too deep",
            {argument: tensor[None]},
            ValueError,
            [f"{argument} must have shape ", f"got {[1, *tensor.shape]}"],
        )
        if "packed" not in kind and kind not in ("additive", "pooling"):
            yield f"{argument} of another batch", {argument: tensor[:2]}, ValueError, ["must have shape [B, "]
    alone = given["image"][0]
    text = given.get("text", given.get("query"))
    if "packed" in kind:
        yield "image of a batch", {"image": IMAGE}, ValueError, ["image must have shape [rows, D] = [any, "]
    elif kind == "channel":
        yield (
            "image of one sample",
            {"image": alone, "text": text[:1]},
            ValueError,
            ["text must have shape [B, E] = [6, any], got [1, 5]", "one sample's [N, D] is image[None]"],
        )
    else:
        yield (
            "image of one sample",
            {"image": alone},
            ValueError,
            ["image must have shape [B, ", f"got {list(alone.shape)}: one sample without a batch is image[None]"],
        )
    if name in ("SpatialAttention", "ChannelAttention", "AdditiveAttention"):
        channels = 1 if kind == "planes" else given["image"].dim() - 1
        yield (
            "image of other channels",
            {"image": given["image"].narrow(channels, 0, 7)},
            ValueError,
            ["image must have shape", "8", "got"],
        )
    if kind == "gated":
        yield "mask a list", {"mask": [True]}, TypeError, ["mask must be a torch.Tensor, got list"]
        mask = torch.ones(3, 4, dtype=torch.bool)
        for what, wrong, message in (
            ("of other tokens", mask[:, 1:], "mask must have shape [B, T] = [3, 4] or broadcast to"),
            ("of integers", mask.long(), "got torch.int64: mask.bool() makes zeros and ones a mask"),
            ("elsewhere", mask.to("meta"), "mask must be on image's device cpu, got meta"),
        ):
            yield f"mask {what}", {"mask": wrong}, ValueError, [message]
    if kind in ("additive", "pooling"):
        yield "query for nothing", {"query": TEXT}, ValueError, ["query must be None with query_dim=None, got Tensor"]
    elif name in ("AdditiveAttention", "AttentionPooling"):
        yield "no query", {"query": None}, ValueError, ["query must be a torch.Tensor with query_dim=5, got NoneType"]
