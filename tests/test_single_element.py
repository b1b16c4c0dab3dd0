"""A softmax over a single element: its weight is 1 whatever its score, so that the scores have no gradient. Plain
PyTorch gives exactly 0, and so does every backend: nothing is left of rounding, which large inputs would make of any
size."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.runnable import runnable

import mmkernels as mmk
from mmkernels import reference, tolerance
from mmkernels.cases import Draw

SCORES = {
    "gated_cross_attention": ("query", "key", "attn_mask"),
    "bidirectional_attention": ("image_query", "text_key"),
    "absorbed_attention": ("key", "key_bias"),
    "deformable_attention": ("scores",),
    "spatial_attention": ("text",),
    "channel_attention": ("text", "weight", "bias"),
    "additive_attention": ("query", "w_image", "w_query", "v", "bias", "w_gate", "bias_gate"),
}


@dataclass(frozen=True)
class Single:
    """A call whose softmaxes have one element each, those that `outputs` come from."""

    name: str
    operation: str
    make: Callable
    outputs: tuple = (0, 1)

    def __str__(self):
        return f"{self.operation}-{self.name}"


def gated(positions, tokens, mask=None, d=257, dv=65):
    def make(draw):
        arguments = {
            "query": draw.normal(2, 1, positions, d),
            "key": draw.normal(2, 1, tokens, d),
            "value": draw.normal(2, 1, tokens, dv),
            "gate": draw.normal(2, 1, positions, dv),
        }
        return (
            arguments
            if mask is None
            else arguments
            | {"attn_mask": mask(draw, torch.arange(positions)[:, None] % tokens == torch.arange(tokens))}
        )

    return make


def absorbed(positions, tokens, masked=False, d=65, dv=257):
    def make(draw):
        arguments = {
            "image": draw.normal(1, positions, d),
            "key": draw.normal(1, 1, tokens, d),
            "value": draw.normal(1, 1, tokens, dv),
            "key_bias": draw.normal(1, 1, tokens),
        }
        return arguments | {"text_mask": torch.arange(tokens)[None] == tokens // 2} if masked else arguments

    return make


def deformable(points, queries=20, heads=3, channels=33):
    """Of several points one, whose scores aren't -Inf."""

    def make(draw):
        scores = draw.normal(2, queries, heads, points)
        return {
            "value": draw.normal(2, 26, heads, channels),
            "spatial_shapes": [(5, 4), (2, 3)],
            "locations": draw.normal(2, queries, heads, points, 2).sigmoid(),
            "scores": scores.masked_fill(~alone(1, points), float("-inf")),
            "points": [points - 1, 1],
        }

    return make


def bidirectional(positions, tokens, masked=False, d=40, dv=257):
    def make(draw):
        arguments = {
            "image_query": draw.normal(1, 1, positions, d),
            "text_key": draw.normal(1, 1, tokens, d),
            "image_value": draw.normal(1, 1, positions, dv),
            "text_value": draw.normal(1, 1, tokens, dv),
        }
        masks = {
            name: torch.arange(size)[None] == size // 2
            for name, size in (("image_mask", positions), ("text_mask", tokens))
        }
        return arguments | masks if masked else arguments

    return make


def spatial(*shape, **options):
    def make(draw):
        channels = shape[1] if len(shape) == 4 else shape[-1]
        batch = len(options["offsets"]) - 1 if "offsets" in options else shape[0]
        return {"image": draw.normal(*shape), "text": draw.normal(batch, channels), **options}

    return make


def additive(*shape, **options):
    def make(draw):
        channels = shape[-1]
        batch = len(options["offsets"]) - 1 if "offsets" in options else shape[0]
        return {
            "image": draw.normal(*shape),
            "query": draw.normal(batch, 5),
            "w_image": draw.normal(20, channels),
            "w_query": draw.normal(20, 5),
            "v": draw.normal(1, 20),
            "bias": draw.normal(20),
            "w_gate": draw.normal(20, channels),
            "bias_gate": draw.normal(20),
            "need_weights": True,
            **options,
        }

    return make


def channel(draw):
    return {
        "image": draw.normal(2, 33, 1) * 7,
        "text": draw.normal(2, 5),
        "weight": draw.normal(1, 6),
        "bias": draw.normal(1),
        "need_weights": True,
    }


def alone(rows, size):
    """The last but one of each row takes part."""
    return (torch.arange(size) == max(size - 2, 0)).expand(rows, size)


BAGS = torch.tensor([0, 1, 1, 2, 3])
BOTH = ("multiply", "pool")
SINGLES = [
    Single("one token", "gated_cross_attention", gated(33, 1)),
    Single("one token in a mask", "gated_cross_attention", gated(33, 5, lambda draw, pairs: pairs[:2, :])),
    Single("one token a query", "gated_cross_attention", gated(7, 5, lambda draw, pairs: pairs[None, None])),
    Single(
        "one of 600 tokens a query",
        "gated_cross_attention",
        gated(3, 600, lambda draw, pairs: pairs[None, None], 17, 24),
    ),
    Single(
        "one above -Inf",
        "gated_cross_attention",
        gated(7, 5, lambda draw, pairs: draw.padding(pairs[None, None], float("-inf"))),
    ),
    Single(
        "one above the lowest",
        "gated_cross_attention",
        gated(7, 5, lambda draw, pairs: draw.padding(pairs[None, None], -draw.largest)),
    ),
    Single("one position and token", "absorbed_attention", absorbed(1, 1)),
    Single("one token", "absorbed_attention", absorbed(33, 1), (0,)),
    Single("one token in a mask", "absorbed_attention", absorbed(33, 5, True), (0,)),
    Single("one token in a mask of many", "absorbed_attention", absorbed(9, 70, True), (0,)),
    Single("one point", "deformable_attention", deformable(1)),
    Single("one of 5 points", "deformable_attention", deformable(5)),
    Single("one of 40 points", "deformable_attention", deformable(40, queries=5, heads=2)),
    Single("one position and token", "bidirectional_attention", bidirectional(1, 1)),
    Single("one position", "bidirectional_attention", bidirectional(1, 64), (1,)),
    Single("one position, many tokens", "bidirectional_attention", bidirectional(1, 70), (1,)),
    Single("one token", "bidirectional_attention", bidirectional(33, 1), (0,)),
    Single("one position and token in masks", "bidirectional_attention", bidirectional(33, 5, True)),
    Single("one position and token in masks, many tokens", "bidirectional_attention", bidirectional(9, 70, True)),
    *(
        Single(f"{name} {combine}", "spatial_attention", make(combine))
        for combine in BOTH
        for name, make in {
            "one position": lambda combine: spatial(3, 1, 60, num_heads=2, combine=combine, need_weights=True),
            "one pixel": lambda combine: spatial(3, 60, 1, 1, layout="bdhw", combine=combine),
            "one in a mask": lambda combine: spatial(3, 11, 60, mask=alone(3, 11), combine=combine, need_weights=True),
            "bags of one": lambda combine: spatial(3, 60, offsets=BAGS, combine=combine),
        }.items()
    ),
    Single("one channel", "channel_attention", channel),
    *(
        Single(f"{name} {combine}", "additive_attention", make(combine))
        for combine in BOTH
        for name, make in {
            "one position": lambda combine: additive(3, 1, 60, combine=combine),
            "one in a mask": lambda combine: additive(3, 11, 60, mask=alone(3, 11), combine=combine),
            "bags of one": lambda combine: additive(3, 60, offsets=BAGS, combine=combine),
        }.items()
    ),
]


@pytest.mark.property("a single element")
@pytest.mark.parametrize(
    "single, backend, device, dtype",
    [
        pytest.param(single, *p.values, id=f"{single}-{p.id}")
        for single in SINGLES
        for p in runnable(single.operation, (torch.float32, torch.bfloat16, torch.float64))
    ],
)
def test_scores_have_no_gradient(single, backend, device, dtype):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in single.make(Draw(dtype, device, 3)).items()
    }
    found, expected = (
        gradients(function, arguments, single.outputs, **options)
        for function, options in (
            (getattr(mmk, single.operation), {"backend": backend}),
            (getattr(reference, single.operation), {}),
        )
    )
    for name in SCORES[single.operation]:
        if name in found:
            assert not expected[name].any() and not found[name].any(), f"{name}: {found[name].abs().max()}"
    if "image" in found:  # what the weights multiply; nothing comes through the scores
        assert torch.equal(found["image"], expected["image"])


def gradients(function, arguments, outputs, **options):
    """By argument, of the weighted sum of some of the outputs."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    results = function(**arguments | leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [i for i in outputs if i < len(results)]
    grads = torch.autograd.grad(
        [results[i] for i in wanted],
        list(leaves.values()),
        [tolerance.upstream_like(i, results[i]) for i in wanted],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, grads))
