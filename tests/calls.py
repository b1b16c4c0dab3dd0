"""A small call of every operation in each of its forms: masks, packed bags, absent inputs, second results."""

import pytest
import torch
from attention_tests import draw
from conftest import runnable

from mmkernels import reference

TOKENS = torch.tensor([[True, False, True], [False, False, False]])  # the second sample has none
PAIRS = torch.tensor([[True, False, True], [False, True, True], [False, False, False], [True, True, True]])[None, None]
POSITIONS = torch.tensor([[True, True, False, True], [False, True, True, True]])
BAGS = torch.tensor([0, 3, 3, 8])
ROWS = torch.arange(8) % 4 > 0

HEADS = {"query": (2, 2, 4, 5), "key": (2, 2, 3, 5), "value": (2, 2, 3, 6), "gate": (2, 2, 4, 6)}
LAYERS = {"w_image": (7, 6), "v": (2, 7), "bias": (7,)}
GATE = {"w_gate": (7, 6), "bias_gate": (7,)}
QUERY = {"query": (2, 3), "w_query": (7, 3)}
NO_QUERY = {"query": None, "w_query": None}

# operation, the shapes of its tensors, its options
CALLS = {
    "spatial": (
        "spatial_attention",
        {"image": (2, 4, 6), "text": (2, 6)},
        {"num_heads": 2, "mask": POSITIONS, "need_weights": True},
    ),
    "spatial pool": (
        "spatial_attention",
        {"image": (2, 4, 6), "text": (2, 6)},
        {"combine": "pool", "need_weights": True},
    ),
    "spatial planes": (
        "spatial_attention",
        {"image": (2, 6, 2, 2), "text": (2, 6)},
        {"layout": "bdhw", "rescale": True},
    ),
    "spatial packed": (
        "spatial_attention",
        {"image": (8, 6), "text": (3, 6)},
        {"offsets": BAGS, "mask": ROWS, "need_weights": True},
    ),
    "spatial packed pool": (
        "spatial_attention",
        {"image": (8, 6), "text": (3, 6)},
        {"offsets": BAGS, "combine": "pool"},
    ),
    "channel": (
        "channel_attention",
        {"image": (2, 4, 6), "text": (2, 3), "weight": (6, 9), "bias": (6,)},
        {"need_weights": True},
    ),
    "channel flat": ("channel_attention", {"image": (2, 6), "text": (2, 3), "weight": (6, 9)}, {}),
    "gated": ("gated_cross_attention", HEADS, {"attn_mask": TOKENS}),
    "gated pairs": ("gated_cross_attention", HEADS, {"attn_mask": PAIRS, "need_weights": True}),
    "gated bias": ("gated_cross_attention", HEADS | {"attn_mask": (2, 1, 4, 3)}, {}),
    "no gate": (
        "gated_cross_attention",
        {name: HEADS[name] for name in ("query", "key", "value")},
        {"need_weights": True},
    ),
    "bidirectional": (
        "bidirectional_attention",
        {
            "image_query": (2, 2, 4, 5),
            "text_key": (2, 2, 3, 5),
            "image_value": (2, 2, 4, 6),
            "text_value": (2, 2, 3, 6),
        },
        {"image_mask": POSITIONS, "text_mask": TOKENS},
    ),
    "additive": (
        "additive_attention",
        {"image": (2, 4, 6)} | QUERY | LAYERS | GATE,
        {"mask": POSITIONS, "need_weights": True},
    ),
    "additive multiply": (
        "additive_attention",
        {"image": (2, 4, 6), "w_image": (7, 6), "v": (1, 7)},
        NO_QUERY | {"combine": "multiply", "activation": "gelu"},
    ),
    "additive packed": (
        "additive_attention",
        {"image": (8, 6)} | LAYERS | GATE,
        NO_QUERY | {"offsets": BAGS, "mask": ROWS, "need_weights": True},
    ),
}


def parameters(names=CALLS, dtypes=(torch.float32,)):
    return [
        pytest.param(*combination.values, name, id=f"{name}-{combination.id}")
        for name in names
        for combination in runnable(CALLS[name][0], dtypes)
    ]


def tensors_of(name, dtype=torch.float64, device="cpu", seed=0):
    return tuple(
        draw(*shape, dtype=dtype, device=device, seed=seed + i) for i, shape in enumerate(CALLS[name][1].values())
    )


def function_of(name, module=reference, device="cpu", **backend):
    """The call as a function of its tensors, which gives a tuple."""
    operation, shapes, options = CALLS[name]
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}

    def run(*tensors):
        results = getattr(module, operation)(**dict(zip(shapes, tensors)), **options, **backend)
        return results if isinstance(results, tuple) else (results,)

    return run
