"""deformable_attention: the same tests on every backend that can run here."""

import copy
import functools
import pickle

import pytest
import torch
from support.attention_tests import (
    assert_gradients,
    assert_module,
    assert_passed,
    assert_right,
    assert_strides_may_be_huge,
    assert_vmap,
    deterministic,
    draw,
    gradients,
)
from support.runnable import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import backends, cases, peers, reference, tolerance
from mmkernels.cases import deformable_attention as sampled

OPERATION = "deformable_attention"
LEVELS = ((5, 4), (2, 3))
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 3, 8, 11, 3)):
    b, h, d, q, p = shape
    sizes = (b, 26, h, d), (b, q, h, len(LEVELS), p, 2), (b, q, h, len(LEVELS), p)
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


def call(function, value, locations, scores, **options):
    return function(value, LEVELS, locations, scores, **options)


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.parametrize(
    "backend, device, dtype, case",
    [
        pytest.param(*p.values, case, id=f"{p.id}-{case.name}")
        for case in cases.selected(OPERATION, small=True)
        if case.group in ("sizes", "dtypes")
        for p in runnable(OPERATION, (torch.float32, torch.bfloat16))
        if cases.is_slow(*p.values[:2])
    ],
)
def test_case_by_atomics(backend, device, dtype, case):
    """Elsewhere the suite asks for deterministic algorithms, which take another way here."""
    with deterministic(False):
        assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("the autograd Function", "vmap", "same bits twice")
@pytest.mark.threads
@on_every_backend
def test_function_vmap_and_twice(backend, device, dtype):
    tensors = inputs(dtype, device)
    run = lambda *t: call(mmk.deformable_attention, *t, backend=backend)
    with deterministic(True):
        first = gradients(run, tensors)
        second = gradients(run, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert_gradients(first, call, OPERATION, tensors)
    flat, points = sum(LEVELS, ()), (3, 3)
    apply = lambda v, xy, s: mmk.DeformableAttentionFunction.apply(
        v, xy.flatten(3, 4), s.flatten(3), None, flat, points, True, False, backend
    )[0]
    assert_gradients(gradients(apply, tensors), call, OPERATION, tensors)
    stacked = [torch.stack([t, t + 1]) for t in tensors]
    assert_vmap(call, (0,) * 3, OPERATION, backend, stacked)


ODD = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


@pytest.mark.property("NaN and Inf come out")
@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "weights given"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["scores", "value"])
@pytest.mark.parametrize(
    "backend, device, dtype",
    [c for c in runnable(OPERATION, (torch.float32, torch.bfloat16)) if c.values[0] != "reference"],
)
def test_what_is_not_finite(backend, device, dtype, name, odd, softmax):
    """Comes out where it does of the definition, also at corners that count nothing, are outside, or are masked. Of
    gradients that are sums over channels, NaN may stand for Inf."""
    levels = ((8, 4), (2, 16))
    made = cases.Draw(dtype, device, 0)
    places = (sampled.within, sampled.around, sampled.on_edges, sampled.far_outside, sampled.not_finite)
    locations = [sampled.locations(made, (2, 2, 0, 6, 3, levels), locate=locate) for locate in places]
    tensors = {
        "value": made.normal(2, 64, 2, 12),
        "locations": torch.cat(locations, 1),
        "scores": made.normal(2, 30, 2, 2, 3),
    }
    tensors[name].flatten()[:: 11 if name == "value" else 7] = ODD[odd]
    options = {"mask": made.mask(2, 64), "softmax": softmax}
    found, expected = (
        gradients(lambda v, xy, s, run=run: run(v, levels, xy, s, **options), tensors.values())
        for run in (functools.partial(mmk.deformable_attention, backend=backend), reference.deformable_attention)
    )
    for what, f, e in zip(("result", *tensors), found, expected):
        assert torch.equal(f.isfinite(), e.isfinite()), what
        if what in ("result", "value"):
            torch.testing.assert_close(*(t.where(~t.isfinite(), 0) for t in (f, e)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("dim", range(3))
def test_far_apart(backend, device, dtype, dim):
    """Strides beyond 2^31 elements from sample to sample, position to position (query to query), and head to head; the
    mask has the first two."""
    mask = draw(2, 26, seed=7) > -0.5
    masked = lambda function, *t: call(function, *t[:3], mask=t[3])
    assert_strides_may_be_huge(masked, OPERATION, backend, [*inputs(dtype, device, (2, 2, 8, 2, 2)), mask], dim, device)


@pytest.mark.property("the module")
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("num_points", [3, (4, 1)], ids=str)
def test_module(extension, boxes, num_points):
    torch.manual_seed(0)
    module = mmk.DeformableAttention(24, 3, len(LEVELS), num_points)
    torch.nn.init.normal_(module.offset_projection.weight, std=0.1)
    torch.nn.init.normal_(module.score_projection.weight)
    mask = torch.arange(52).view(2, 26) % 4 > 0
    points = torch.rand(2, 7, len(LEVELS), 4 if boxes else 2, generator=torch.Generator().manual_seed(1))
    tensors = draw(2, 7, 24), draw(2, 26, 24, seed=1), points
    assert_module(lambda m, q, i, p: m(q, i, p, LEVELS, query_position=q.cos(), mask=mask), module, tensors)


@pytest.mark.parametrize("num_points", [2, (3, 1)], ids=str)
@pytest.mark.parametrize("boxes", [False, True])
def test_module_keeps_constants_for_any_call(extension, boxes, num_points):
    """Those of sizes that no other test has, made in inference mode, serve autograd, vmap and copies of the module."""
    levels = ((1, 29), (2, 3 + 2 * boxes))
    module = mmk.DeformableAttention(6, 3, 2, num_points)
    torch.nn.init.normal_(module.score_projection.weight)
    size = sum(y * x for y, x in levels)
    query, image, points = draw(2, 3, 6), draw(2, size, 6, seed=1), torch.rand(2, 3, 2, 4 if boxes else 2)
    with torch.inference_mode():
        expected = module(query, image, points, levels)
    for function in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        result = function(query, image, points.requires_grad_(), torch.tensor(levels))
        assert torch.equal(result, expected)
        torch.autograd.backward(result.sum())
    run = lambda *tensors: module(*(t[None] for t in tensors), levels)[0]
    torch.testing.assert_close(torch.func.vmap(run)(query, image, points), expected)


def test_module_begins_as_published():
    """Appendix A.4 of the paper: the first points lie around the reference point, all with the same weight."""
    module = mmk.DeformableAttention(16, 8, 1, 2)
    offsets = module.offset_projection.bias.detach().view(8, 2, 2)
    around = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    torch.testing.assert_close(offsets, around[:, None] * torch.tensor([[1.0], [2.0]]))
    assert not module.score_projection.weight.any() and not module.score_projection.bias.any()


@pytest.mark.threads
@pytest.mark.property("same bits for any number of threads")
@pytest.mark.parametrize("name", ["1x1x8x3001x4x113,97", "3x5x12x300x8x16,16x8,8x4,4", "1x1x300x97x9x23,31x5,7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(extension, name, dtype):
    """Not even of the value's gradient, where heads, channels or positions are shared out."""
    case = next(case for case in cases.selected(OPERATION) if case.name == f"large: {name}")
    arguments = case.build(dtype)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return tolerance.evaluate(mmk.deformable_attention, arguments, backend="cpu")
        finally:
            torch.set_num_threads(before)

    alone = run(1)
    for threads in (2, 3, 7):
        assert all(torch.equal(alone[key], found) for key, found in run(threads).items())


@pytest.mark.threads
@pytest.mark.property("bounded memory")
def test_samples_take_no_memory(extension):
    """2,000 queries with 8 heads of 16 points and 32 channels, stacked: 33 MB. A copy of one head's map is all."""
    case = sampled.locations(cases.Draw(torch.float32, "cpu", 0), (1, 8, 32, 2000, 16, ((40, 50),)))
    value, scores = draw(1, 2000, 8, 32), draw(1, 2000, 8, 1, 16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = mmk.deformable_attention(value, [(40, 50)], case, scores, backend="cpu")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert allocated < 1.1 * result.nbytes


@pytest.mark.property("values of any arguments", backend="cpu")
def test_a_hundred_public_shapes(extension):
    """1 to 5 levels, 1 to 300 channels, 1 to 9 points; results and gradients."""
    generator = torch.Generator().manual_seed(0)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    for i in range(100):
        levels = [(number(1, 12), number(1, 12)) for _ in range(number(1, 5))]
        shape = number(1, 2), number(1, 4), number(1, 300), number(1, 30), number(1, 9), levels

        make = functools.partial(sampled.arguments, shape=shape, locate=sampled.around)
        case = cases.Case(f"{i}: {shape}", "any", make, True)
        assert_passed(tolerance.Standard(OPERATION, case, torch.float32).test(mmk.deformable_attention, backend="cpu"))


def test_spatial_shapes_and_points_of_any_sequence():
    value, locations, scores = inputs()
    expected = mmk.deformable_attention(value, LEVELS, locations, scores)
    for shapes in (torch.tensor(LEVELS), [list(level) for level in LEVELS], [torch.Size(level) for level in LEVELS]):
        assert torch.equal(mmk.deformable_attention(value, shapes, locations, scores), expected)
    flat = locations.flatten(3, 4), scores.flatten(3)
    for points in ([3, 3], torch.Size((3, 3)), range(3, 4)):
        if len(points) == 2:
            assert torch.equal(mmk.deformable_attention(value, LEVELS, *flat, points=points), expected)


@on_every_backend
def test_autocast_leaves_locations_their_bits(backend, device, dtype):
    value, locations, scores = inputs(dtype, device)
    narrow = mmk.deformable_attention(value.bfloat16(), LEVELS, locations, scores.bfloat16(), backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(mmk.deformable_attention(value, LEVELS, locations, scores, backend=backend), narrow)


def test_peer_is_grid_sample():
    """Of one head and level, one point with all the weight: PyTorch's own function."""
    value, xy = draw(2, 20, 1, 6), torch.rand(2, 9, 1, 1, 1, 2)
    expected = torch.nn.functional.grid_sample(
        value[:, :, 0].mT.unflatten(2, (5, 4)), 2 * xy[:, :, 0, 0] - 1, align_corners=False
    )
    found = peers.deformable_attention(value, [(5, 4)], xy, torch.zeros(2, 9, 1, 1, 1))
    torch.testing.assert_close(found, expected[..., 0].mT)


@pytest.mark.property("opcheck", "opcheck backward", backend="triton")
@pytest.mark.skipif(not backends.INTERPRETED, reason="mmkernels was imported without TRITON_INTERPRET=1")
def test_opcheck_of_triton():
    """The interpreter runs the registered operations as a GPU would."""
    operations = torch.ops.mmkernels
    value, locations, scores = inputs(shape=(1, 2, 8, 3, 2))
    arguments = value, locations.flatten(3, 4), scores.flatten(3), draw(1, 26) > -1
    options = sum(LEVELS, ()), (2, 2), True, True
    torch.library.opcheck(operations.deformable_attention_triton.default, (*arguments, *options))
    result, rows = operations.deformable_attention_triton(*arguments, *options)
    torch.library.opcheck(
        operations.deformable_attention_triton_backward.default, (result, *arguments, rows, *options, *(True,) * 3)
    )


@pytest.mark.property("mistakes of a kernel's caller", backend="triton")
@pytest.mark.skipif(not backends.INTERPRETED, reason="mmkernels was imported without TRITON_INTERPRET=1")
@pytest.mark.parametrize("place", range(4))
def test_operation_of_triton_refuses(place):
    """A tensor that is too short, or of another dtype, is never read."""
    value, locations, scores = inputs(shape=(1, 2, 8, 3, 2))
    arguments = [value, locations.flatten(3, 4), scores.flatten(3), draw(1, 26) > -1]
    options = sum(LEVELS, ()), (2, 2), True, False
    for wrong in (arguments[place][:, :-1], arguments[place].to(torch.complex64)):
        with pytest.raises(RuntimeError):
            torch.ops.mmkernels.deformable_attention_triton(
                *arguments[:place], wrong, *arguments[place + 1 :], *options
            )
