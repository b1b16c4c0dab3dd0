"""Where a kernel's work is cut in ways that plain cases don't reach: more heads than a block takes, more parts than a
warp merges at once, bags that begin inside a chunk, warps that run far ahead of each other, sums that must cancel."""

import importlib
import itertools

import pytest
import torch
from support import emulated
from support.attention_tests import assert_right, assert_rule
from support.runnable import runnable

import mmkernels as mmk
from mmkernels import backends, cases, peers, reference

needs_emulator = pytest.mark.skipif(emulated.why_not_here() is not None, reason=str(emulated.why_not_here()))
EMULATED = "cuda-emulated", "cpu"


def assert_right_on(operation, case, dtype, device, backend, **configuration):
    """On a device of the emulator's as well, where the backend is emulated."""
    if backend != EMULATED[0]:
        return assert_right(operation, case, dtype, device, backend)
    with emulated.configured(**configuration):
        assert_right(operation, case, dtype, device, backend)


def spatial(name, shape, bags=None, mask=False, **options):
    def build(draw):
        samples = shape[0] if bags is None else len(bags)
        arguments = {"image": draw.normal(*shape), "text": draw.normal(samples, shape[-1]), "need_weights": True}
        if mask:
            arguments["mask"] = draw.mask(*shape[:-1])
        if bags is not None:
            arguments["offsets"] = torch.tensor([0, *itertools.accumulate(bags)], device=draw.device)
        return arguments | options

    return cases.Case(f"{name} {options.get('combine', 'multiply')}", "cut", build, True)


def additive(name, bags, channels, hidden, **options):
    def build(draw):
        return {
            "image": draw.normal(sum(bags), channels),
            "query": None,
            "w_image": draw.normal(hidden, channels) * channels**-0.5,
            "w_query": None,
            "v": draw.normal(1, hidden),
            "offsets": torch.tensor([0, *itertools.accumulate(bags)], device=draw.device),
            "need_weights": True,
        } | options

    return cases.Case(f"{name} {options.get('combine', 'pool')}", "cut", build, True)


def heads(operation, batch, count, positions, tokens, d, dv, masked=False):
    def build(draw):
        image, text = (draw.normal(batch, count, n, d) for n in (positions, tokens))
        image_value, text_value = (draw.normal(batch, count, n, dv) for n in (positions, tokens))
        image_mask, text_mask = draw.mask(batch, positions), draw.mask(batch, tokens)
        if operation == "gated_cross_attention":
            given = {"query": image, "key": text, "value": text_value, "gate": image_value}
            return given | ({"attn_mask": text_mask} if masked else {})
        given = {"image_query": image, "text_key": text, "image_value": image_value, "text_value": text_value}
        return given | ({"image_mask": image_mask, "text_mask": text_mask} if masked else {})

    return cases.Case(f"{batch}x{count}x{positions}x{tokens}x{d}x{dv} masked={masked}", "cut", build, True)


# A sample for a block, chunks of a sample, blocks of a cluster.
MANY_HEADS = {
    "whole": dict(),
    "chunks": dict(shared=12_000, processors=30),
    "cluster": dict(shared=36_000, processors=1, cluster=8),
}


# Only an emulated device can be chosen.
@pytest.mark.parametrize(
    "backend, device, dtype, how",
    [
        pytest.param(*each.values, how, id=f"{each.id}-{how}")
        for each in runnable("spatial_attention")
        for how in (MANY_HEADS if each.values[0] == EMULATED[0] else ["whole"])
    ],
)
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("bags", [None, (30, 0, 40)], ids=["dense", "packed"])
def test_many_heads(bags, combine, backend, device, dtype, how):
    """Two groups of heads on a GPU, the second not full."""
    shape = (2, 70, 140) if bags is None else (sum(bags), 140)
    case = spatial(f"70 heads {bags}", shape, bags, num_heads=70, combine=combine)
    assert_right_on("spatial_attention", case, dtype, device, backend, **MANY_HEADS[how])


@pytest.mark.parametrize("backend, device, dtype", runnable("spatial_attention"))
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("bags", [(500, 1600), (1, 1100, 2047, 1)], ids=str)
def test_bags_begin_inside_a_chunk(bags, combine, backend, device, dtype):
    """And reach one chunk further than their length alone would have it."""
    case = spatial(f"bags {bags}", (sum(bags), 4), bags, num_heads=2, combine=combine)
    assert_right_on("spatial_attention", case, dtype, device, backend, shared=8_000, processors=3)


@pytest.mark.parametrize("backend, device, dtype", runnable("additive_attention"))
def test_additive_bags_begin_inside_a_panel(backend, device, dtype):
    case = additive("bags", (300, 900, 1), 3, 4)
    assert_right_on("additive_attention", case, dtype, device, backend, processors=40)


@needs_emulator
@pytest.mark.parametrize("combine", ["multiply", "pool"])
def test_spatial_attention_in_many_chunks(combine):
    """More chunks than a warp has lanes."""
    case = spatial("many chunks", (1, 1200, 3), combine=combine, mask=True, rescale=True)
    with emulated.configured(shared=3_600, processors=132, order="warps"):
        emulated.counts()
        mmk.spatial_attention(**case.build(torch.float32), backend=EMULATED[0])
        assert emulated.counts().blocks > 2 * 32
        assert_right("spatial_attention", case, torch.float32, *reversed(EMULATED))


@pytest.mark.skipif(
    backends.why_not("triton", "spatial_attention", "cpu", torch.float32) is not None,
    reason="needs Triton's interpreter",
)
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("bags", [None, (40, 4200)], ids=["dense", "packed"])
@pytest.mark.parametrize("processors", [132, 1])
def test_triton_in_many_chunks(processors, bags, combine, monkeypatch):
    """With many processors more chunks than are merged at once, of a tile each; with one, several tiles a chunk."""
    kernels = importlib.import_module("mmkernels.triton.spatial_attention")
    monkeypatch.setattr(kernels, "processors", lambda tensor: processors)
    shape = (1, 4240, 64) if bags is None else (sum(bags), 64)
    case = spatial(f"many chunks {bags}", shape, bags, mask=True, rescale=True, combine=combine)
    assert_right("spatial_attention", case, torch.float32, "cpu", "triton")


@needs_emulator
@pytest.mark.parametrize(
    "operation, positions, tokens", [("gated_cross_attention", 3, 4220), ("bidirectional_attention", 4220, 3)]
)
def test_attention_in_many_parts(operation, positions, tokens):
    """More parts of the stream than a warp has lanes."""
    case = heads(operation, 1, 1, positions, tokens, 4, 68)
    with emulated.configured(**emulated.H100):
        emulated.counts()
        getattr(mmk, operation)(**case.build(torch.float32), backend=EMULATED[0])
        assert emulated.counts().blocks > 32
        assert_right(operation, case, torch.float32, *reversed(EMULATED))


@needs_emulator
def test_absorbed_attention_in_parts():
    """Positions of a GPU with many processors are split over blocks, whose sums are merged."""

    def build(draw):
        return {
            "image": draw.normal(1, 2100, 20),
            "key": draw.normal(1, 2, 3, 20) * 0.3,
            "value": draw.normal(1, 2, 3, 12),
            "key_bias": draw.normal(1, 2, 3),
            "image_mask": draw.mask(1, 2100),
        }

    case = cases.Case("absorbed in parts", "cut", build, True)
    with emulated.configured(**emulated.H100):
        assert_right("absorbed_attention", case, torch.float32, *reversed(EMULATED))


@pytest.mark.parametrize(
    "operation, backend, device, dtype",
    [
        pytest.param(operation, *each.values, id=f"{operation}-{each.id}")
        for operation in ("gated_cross_attention", "bidirectional_attention")
        for each in runnable(operation)
        if each.values[0] != "reference"
    ],
)
@pytest.mark.parametrize("positions, tokens", [(3, 300), (300, 3)])
def test_parts_of_several_heads(positions, tokens, operation, backend, device, dtype, monkeypatch):
    """Every head's parts are its own, where both sides are cut."""
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("mmkernels.triton.heads"), "processors", lambda tensor: 100)
    case = heads(operation, 2, 2, positions, tokens, 4, 6)
    assert_right_on(operation, case, dtype, device, backend, **emulated.H100)


def sampled(value, spatial_shapes, locations, scores):
    return {"value": value, "spatial_shapes": spatial_shapes, "locations": locations, "scores": scores}


def equal_weights(operation):
    """Sums of one number, again and again: weights are exactly 1 / count. A total in bfloat16 would be off by more than
    1.7%, whether the number is added alone, or 8 to 128 at a time, in one part or four."""

    def build(draw):
        zeros = lambda *shape: torch.zeros(shape, device=draw.device, dtype=draw.dtype)
        values = lambda *shape: zeros(*shape) + (1 + 104 / 128)
        if operation == "spatial_attention":
            return {"image": values(1, 8192, 2), "text": zeros(1, 2), "combine": "pool"}
        if operation == "additive_attention":
            weights = {"w_image": draw.normal(2, 2), "w_query": None, "v": zeros(1, 2)}
            return {"image": values(1, 8192, 2), "query": None, **weights}
        if operation == "absorbed_attention":
            return {"image": values(1, 1024, 2), "key": zeros(1, 1, 1, 2), "value": zeros(1, 1, 1, 2) + 1}
        if operation == "deformable_attention":
            locations = zeros(1, 1, 1, 1, 4096, 2) + 0.5
            return sampled(values(1, 1, 1, 2), [(1, 1)], locations, zeros(1, 1, 1, 1, 4096))
        one = zeros(1, 1, 1, 2)
        if operation == "gated_cross_attention":
            return {"query": one, "key": zeros(1, 1, 4096, 2), "value": values(1, 1, 4096, 2), "gate": one + 1}
        image = {"image_query": zeros(1, 1, 1024, 2), "image_value": values(1, 1, 1024, 2)}
        return {"text_key": one, "text_value": one + 1, **image}

    return cases.Case("equal weights", "cut", build, True)


@pytest.mark.parametrize(
    "operation, backend, device, dtype",
    [
        pytest.param(operation, *each.values, id=f"{operation}-{each.id}")
        for operation in mmk.functional.__all__
        if operation != "channel_attention"  # sums over its few channels
        for each in runnable(operation, [torch.bfloat16])
        if each.values[0] != "reference"
    ],
)
def test_long_sums_are_float32(operation, backend, device, dtype):
    """Also where there is one processor, and none of them is cut short."""
    assert_right_on(operation, equal_weights(operation), dtype, device, backend, processors=1)


def rising(operation):
    """Scores that rise from 0 to 30 along what a softmax runs over, which is longer than any kernel takes at once."""

    def build(draw):
        def ramp(*shape, most=30.0, dim=-2):
            """Channel 0 (or all along `dim` -1) rises, the others are random."""
            values = draw.normal(*shape)
            steps = torch.linspace(0, most, shape[dim], device=draw.device).to(draw.dtype)
            (values if dim == -1 else values[..., 0])[:] = steps
            return values

        first = torch.tensor([[1.0, 0.0]], device=draw.device, dtype=draw.dtype)
        if operation == "spatial_attention":
            return {"image": ramp(1, 9000, 8), "text": first.repeat(1, 4) * 2, "scale": 0.5, "combine": "pool"}
        if operation == "additive_attention":
            network = {"w_image": first, "w_query": None, "v": first[:, :1], "activation": "relu"}
            return {"image": ramp(1, 3000, 2), "query": None, **network}
        if operation == "channel_attention":
            weight = draw.normal(2100, 2102) / 2100
            return {"image": draw.normal(1, 2, 2100), "text": first, "weight": weight, "bias": ramp(2100, dim=-1)}
        if operation == "gated_cross_attention":
            query, key, gate = first.expand(1, 1, 3, 2).contiguous(), ramp(1, 1, 1200, 2), draw.normal(1, 1, 3, 2)
            return {"query": query, "key": key, "value": draw.normal(1, 1, 1200, 2), "gate": gate, "scale": 1.0}
        if operation == "deformable_attention":
            locations = draw.normal(1, 1, 1, 1, 1200, 2).sigmoid()
            return sampled(draw.normal(1, 30, 1, 2), [(5, 6)], locations, ramp(1, 1, 1, 1, 1200, dim=-1))
        image, text = ramp(1, 1, 130, 2, most=6.0), ramp(1, 1, 600, 2, most=5.0)
        if operation == "absorbed_attention":
            return {"image": image[:, 0], "key": text[:, :, ::3], "value": draw.normal(1, 1, 200, 2)}
        values = {"image_value": draw.normal(1, 1, 130, 2), "text_value": draw.normal(1, 1, 600, 2)}
        return {"image_query": image, "text_key": text, **values, "scale": 1.0}

    return cases.Case("rising scores", "cut", build, True)


@pytest.mark.parametrize(
    "operation, backend, device, dtype",
    [
        pytest.param(operation, *each.values, id=f"{operation}-{each.id}")
        for operation in mmk.functional.__all__
        for each in runnable(operation)
        if each.values[0] != "reference"
    ],
)
def test_scores_that_rise(operation, backend, device, dtype):
    """Every block of them has a new maximum: what was summed before fades, or would be far too large."""
    assert_right_on(operation, rising(operation), dtype, device, backend, processors=1)


# Each warp of a block runs as far as it gets, the first or the last before the others; copies arrive as late as they
# may.
WARPS = ["warps", "warps_descending"]


@needs_emulator
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("order", WARPS)
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_spatial_attention_warp_by_warp(count, combine, order, late):
    """Several tiles a chunk, several chunks, and a mask; with many heads a team is one warp, and meets no other."""
    case = spatial(f"{count} heads", (1, 300, 9 * count), num_heads=count, combine=combine, mask=True)
    for processors in (1, 4):
        with emulated.configured(shared=11_000, processors=processors, order=order, late_copies=late):
            assert_right("spatial_attention", case, torch.float32, *reversed(EMULATED))


@needs_emulator
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("order", WARPS)
@pytest.mark.parametrize("tokens", [20, 77])
@pytest.mark.parametrize("operation", ["gated_cross_attention", "bidirectional_attention"])
def test_attention_warp_by_warp(operation, tokens, order, late):
    """A text that stays in shared memory while a block goes from tile to tile."""
    case = heads(operation, 1, 2, 400, tokens, 8, 8, masked=True)
    with emulated.configured(shared=227 << 10, processors=1, order=order, late_copies=late):
        assert_right(operation, case, torch.float32, *reversed(EMULATED))


@pytest.mark.parametrize(
    "backend, device, dtype", [each for each in runnable("additive_attention") if each.values[0] != "reference"]
)
def test_a_common_part_cancels(backend, device, dtype):
    """A gradient of the weights that is the same at all positions changes nothing, however large: what is compared with
    is the call without it. All numbers are exact in float32."""
    arguments = additive("common", (37, 200, 5), 6, 7).build(dtype, device)
    leaves = [
        name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    draw = torch.Generator().manual_seed(3)
    own = torch.randint(-32, 33, (1, 242), generator=draw) / 8

    def gradients(function, common, wide=None, **options):
        given = {n: v.to(wide or v.dtype) if n in leaves else v for n, v in arguments.items()}
        given |= {n: given[n].detach().requires_grad_() for n in leaves}
        _, weights = function(**given, **options)
        upstream = (own + common).to(weights.device, weights.dtype)
        return torch.autograd.grad(weights, [given[n] for n in leaves], upstream, materialize_grads=True)

    found = gradients(mmk.additive_attention, 1024.0, backend=backend)
    truth = gradients(reference.additive_attention, 0.0, torch.float64)
    assert_rule(found, truth, gradients(peers.additive_attention, 0.0))
