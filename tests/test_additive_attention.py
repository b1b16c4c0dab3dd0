"""additive_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from support.attention_tests import (
    assert_computes,
    assert_gradients,
    assert_module,
    assert_right,
    assert_strides_may_be_huge,
    draw,
    gradients,
)
from support.runnable import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import cases

OPERATION = "additive_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, cases.DTYPES))
NAMES = ("image", "query", "w_image", "w_query", "v", "bias", "w_gate", "bias_gate")


def inputs(dtype=torch.float32, device="cpu", shape=(2, 13, 20), hidden=7, text=5, maps=1, bags=None):
    """All tensors, by name."""
    batch, channels = bags or shape[0], shape[-1]
    sizes = (
        shape,
        (batch, text),
        (hidden, channels),
        (hidden, text),
        (maps, hidden),
        (hidden,),
        (hidden, channels),
        (hidden,),
    )
    return {
        name: draw(*size, dtype=dtype, device=device, seed=i) * (0.3 if name[0] == "w" else 1)
        for i, (name, size) in enumerate(zip(NAMES, sizes))
    }


def call_of(**options):
    """The operation, given first, on tensors in their order."""
    return lambda function, *tensors: function(**dict(zip(NAMES, tensors)), **options)


def run_of(backend, **options):
    return functools.partial(call_of(**options), functools.partial(mmk.additive_attention, backend=backend))


def function_of(backend):
    """Its autograd Function, of the tensors: the result."""
    options = None, None, None, 0, True, 0.0, False, 0
    return lambda *tensors: mmk.AdditiveAttentionFunction.apply(*tensors, *options, backend)[0]


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("nothing takes part")
@on_every_backend
@pytest.mark.parametrize("combine", ["pool", "multiply"])
def test_a_sample_alone(backend, device, dtype, combine):
    """A masked sample gives 0 and gets no gradient, and doesn't change the other's."""
    tensors = list(inputs(dtype, device).values())
    mask = torch.ones(2, 13, dtype=torch.bool, device=device)
    mask[1] = False
    run = lambda tensors, mask: gradients(run_of(backend, combine=combine, mask=mask), tensors)
    both = run(tensors, mask)
    first = [t[:1] if i < 2 else t for i, t in enumerate(tensors)]
    assert not both[0][1].any() and not both[1][1].any() and not both[2][1].any()
    assert_computes(call_of(combine=combine), OPERATION, backend, first, found=both[0][:1])


@pytest.mark.property("packed bags")
@on_every_backend
@pytest.mark.parametrize("combine, maps", [("pool", 3), ("multiply", 1)])
def test_packed_bags_are_samples(backend, device, dtype, combine, maps):
    """Bags of the same size, packed: the same numbers as a batch."""
    tensors = inputs(dtype, device, (3, 11, 20), maps=maps)
    offsets = torch.arange(0, 34, 11, device=device)
    result, image_grad, *grads = gradients(
        run_of(backend, combine=combine, offsets=offsets), (tensors["image"].flatten(0, 1), *list(tensors.values())[1:])
    )
    found = result if combine == "pool" else result.view(3, 11, 20), image_grad.view(3, 11, 20), *grads
    # The gradient that flows in is drawn by its shape: the same numbers, packed or not.
    assert_gradients(found, call_of(combine=combine), OPERATION, list(tensors.values()))


@pytest.mark.property("strided offsets")
@on_every_backend
def test_strided_offsets(backend, device, dtype):
    """Bounds that are a column of a table."""
    tensors = inputs(dtype, device, (13, 20), bags=2)
    table = torch.tensor([[0, 99], [5, 99], [13, 99]], device=device)
    strided, dense = (
        gradients(run_of(backend, offsets=offsets), tensors.values())
        for offsets in (table[:, 0], table[:, 0].contiguous())
    )
    assert all(torch.equal(a, e) for a, e in zip(strided, dense))


@pytest.mark.property("weights")
@on_every_backend
def test_against_multihead_pooling_of_one(backend, device, dtype):
    """K maps are K calls with one."""
    tensors = inputs(dtype, device, maps=4)
    result, weights = run_of(backend, need_weights=True)(*tensors.values())
    for k in range(4):
        one = {**tensors, "v": tensors["v"][k : k + 1]}.values()
        assert_computes(
            call_of(need_weights=True), OPERATION, backend, one, found=(result[:, k : k + 1], weights[:, k : k + 1])
        )


@pytest.mark.property("masked values reach nothing", "nothing takes part")
@on_every_backend_and_dtype
@pytest.mark.parametrize("packed", [False, True])
def test_masked_scores(backend, device, dtype, packed):
    """They are -Inf, whatever is masked holds, and what flows into them reaches nothing; the last sample is masked."""
    tensors = inputs(dtype, device, (26, 20) if packed else (2, 13, 20), maps=2, bags=2)
    mask = torch.arange(26, device=device) % 3 != 1
    mask[13:] = False
    mask = mask if packed else mask.view(2, 13)
    options = {"offsets": torch.tensor([0, 13, 26], device=device)} if packed else {}
    masked = ~mask.expand(2, 26) if packed else ~mask[:, None].expand(2, 2, 13)

    def computed(value, upstream):
        given = {**tensors, "image": tensors["image"].masked_fill(~mask[..., None], value)}
        leaves = [t.detach().requires_grad_() for t in given.values()]
        _, scores = run_of(backend, mask=mask, need_scores=True, **options)(*leaves)
        grad = draw(*scores.shape, device=device).to(scores.dtype).masked_fill(masked, upstream)
        return scores.detach(), *torch.autograd.grad(scores, leaves, grad)

    scores, *grads = computed(0, 0)
    assert torch.equal(scores.isneginf(), masked) and not scores.isnan().any()
    assert all(g.isfinite().all() for g in grads) and not grads[0][13 if packed else 1 :].any()
    nan = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(computed(nan, nan), (scores, *grads)))


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize(
    "shape, dim", [(shape, dim) for shape in ((2, 2, 2), (2, 108, 16), (216, 16)) for dim in range(len(shape))], ids=str
)
@pytest.mark.parametrize("combine, maps", [("pool", 3), ("multiply", 1)])
def test_far_apart(backend, device, dtype, shape, dim, combine, maps):
    """Strides beyond 2^31 elements from sample to sample, row to row, channel to channel; in the layers from row to
    row, column to column."""
    packed = len(shape) == 2
    tensors = inputs(dtype, device, shape, hidden=min(shape[-1], 7), maps=maps, bags=2 if packed else None)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask[..., -1] = False  # the last alone: whole tiles before it take part
    offsets = torch.tensor([0, 100, 216]) if packed else None
    call = lambda function, *t: call_of(combine=combine, mask=t[8], offsets=offsets, need_weights=True)(
        function, *t[:8]
    )
    assert_strides_may_be_huge(call, OPERATION, backend, [*tensors.values(), mask], dim, device)


@pytest.mark.property("the autograd Function")
@on_every_backend
def test_function(backend, device, dtype):
    tensors = list(inputs(dtype, device).values())
    found = gradients(function_of(backend), tensors)
    compute = lambda function, *t: gradients(functools.partial(call_of(), function), t)
    assert_computes(compute, OPERATION, backend, tensors, found=found)


@pytest.mark.property("autocast")
@on_every_backend
def test_autocast(backend, device, dtype):
    """Low precision in, low precision out."""
    t = inputs(dtype, device)
    with torch.autocast(device, torch.bfloat16):
        result = run_of(backend)(*t.values())
    assert result.dtype == torch.bfloat16
    assert_computes(call_of(), OPERATION, backend, [x.bfloat16() for x in t.values()], found=result)


@pytest.mark.property("autocast")
@on_every_backend
@pytest.mark.parametrize("text", [5, 300])
def test_autocast_changes_nothing_inside(backend, device, dtype, text):
    """What comes in float32 isn't rounded on the way: the same bits, and the same gradients when autocast is on
    backward. (A query's product is the library's where it isn't small.)"""
    tensors = list(inputs(dtype, device, text=text).values())
    plain = gradients(function_of(backend), tensors)
    with torch.autocast(device, torch.bfloat16):
        found = gradients(function_of(backend), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, plain)) or backend == "reference"


@pytest.mark.property("opcheck")
@pytest.mark.parametrize("packed, kept_rows, p", [(False, 0, 0.0), (True, 0, 0.0), (False, 7, 0.5), (True, 13, 0.0)])
def test_opcheck(extension, packed, kept_rows, p):
    seed = torch.tensor(5) if p else None
    t = inputs(shape=(13, 20) if packed else (2, 13, 20), bags=2, maps=2)
    given = [x.requires_grad_() for x in t.values()]
    torch.library.opcheck(
        torch.ops.mmkernels.additive_attention.default,
        (*given, None, torch.tensor([0, 5, 13]) if packed else None, seed, 2, True, p, packed, kept_rows),
    )


@pytest.mark.property("the module")
@pytest.mark.parametrize("query_dim, gated", [(None, True), (9, False)])
def test_module(extension, query_dim, gated):
    torch.manual_seed(0)
    module = mmk.AdditiveAttention(24, 10, query_dim, num_queries=2, gated=gated)
    image = draw(2, 30, 24)
    query = None if query_dim is None else draw(2, query_dim, seed=1)
    mask = torch.arange(60).view(2, 30) % 4 > 0
    assert_module(lambda m, image, query: m(image, query, mask=mask, need_weights=True), module, (image, query))
    pooled = module(image.flatten(0, 1), query, offsets=torch.tensor([0, 30, 60]))
    assert_module(lambda m, image, query: m(image, query), module, (image, query), found=pooled)
