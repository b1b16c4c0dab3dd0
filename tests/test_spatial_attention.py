"""spatial_attention: the same tests on every backend that can run here."""

from contextlib import contextmanager

import pytest
import torch
from support.attention_tests import (
    assert_computes,
    assert_right,
    assert_rule,
    assert_strides_may_be_huge,
    assert_vmap,
    draw,
    far_apart,
    gradients,
)
from support.runnable import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import backends, cases, reference

OPERATION = "spatial_attention"
ALL = cases.DTYPES

on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, ALL))
both_ways = pytest.mark.parametrize("combine", ["multiply", "pool"])


def inputs(dtype=torch.float32, device="cpu", shape=(3, 29, 24)):
    """image, text, and a mask without any sample that is masked completely."""
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 3] = True
    text = draw(shape[0], shape[2], dtype=dtype, device=device, seed=1)
    return draw(*shape, dtype=dtype, device=device), text, mask.to(device)


def calling(**options):
    """``call(function, *tensors)`` with options. Peers give weights in image's dtype, the others in float32 at
    least."""

    def call(function, *tensors):
        found = function(*tensors, **options)
        if not options.get("need_weights"):
            return found
        return found[0], found[1].to(torch.promote_types(found[1].dtype, torch.float32))

    return call


# Results and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("the autograd Function")
@on_every_backend_and_dtype
def test_function(backend, device, dtype):
    """The autograd Function is the same thing."""
    image, text, mask = inputs(dtype, device)
    public = gradients(mmk.spatial_attention, (image, text), mask=mask, scale=0.2, num_heads=2, backend=backend)
    apply = lambda i, t: mmk.SpatialAttentionFunction.apply(i, t, mask, None, 0.2, 2, False, False, backend)[0]
    for a, e in zip(gradients(apply, (image, text)), public):
        assert torch.equal(a, e)


# Nothing takes part, NaN, Inf, huge scores ----------------------------------------------------------------------------


@pytest.mark.property("nothing takes part")
@on_every_backend_and_dtype
@both_ways
@pytest.mark.parametrize("layout", ["bnd", "packed"])
def test_nothing_takes_part(backend, device, dtype, combine, layout):
    """All masked, and what is masked is NaN: exactly 0 everywhere."""
    image, text, mask = inputs(dtype, device)
    image[1] = float("nan")
    mask[1] = False
    options = {"mask": mask}
    if layout == "packed":
        options = {"mask": mask.flatten(), "offsets": torch.tensor([0, 29, 58, 87], device=device)}
        image = image.flatten(0, 1)
    options |= {"combine": combine, "rescale": True, "num_heads": 2, "backend": backend}
    image.requires_grad_(), text.requires_grad_()
    result, weights = mmk.spatial_attention(image, text, need_weights=True, **options)
    grads = torch.autograd.grad((result, weights), (image, text), (torch.ones_like(result), torch.ones_like(weights)))
    if layout == "packed":
        weights = weights.unflatten(1, (3, 29)).movedim(1, 0)
        result = result if combine == "pool" else result.unflatten(0, (3, 29))
        grads = grads[0].unflatten(0, (3, 29)), grads[1]
    for tensor in (result, weights, *grads):
        assert bool((tensor[1] == 0).all()) and bool(tensor.isfinite().all())
        assert bool((tensor[0] != 0).any()) and bool((tensor[2] != 0).any())


@pytest.mark.property("NaN and Inf come out", "NaN stays in its sample")
@on_every_backend_and_dtype
@both_ways
@pytest.mark.parametrize("value, sign", [(float("nan"), 1), (float("inf"), 1), (float("-inf"), 1), (float("inf"), -1)])
def test_unmasked_nan_and_inf(backend, device, dtype, combine, value, sign):
    """The same NaN as in the reference, and only in the sample that holds it."""
    image, text, mask = inputs(dtype, device)
    text[:, 2] = sign
    image[1, 3, 2] = value
    options = {"mask": mask, "combine": combine, "need_weights": True, "num_heads": 2}
    actual = mmk.spatial_attention(image, text, backend=backend, **options)
    expected = reference.spatial_attention(image, text, **options)
    clean = mmk.spatial_attention(image.nan_to_num(0, 0, 0), text, backend=backend, **options)
    for a, e, c in zip(actual, expected, clean):
        assert torch.equal(a.isnan(), e.isnan()) and torch.equal(a.isinf(), e.isinf())
        assert torch.equal(a[0], c[0]) and torch.equal(a[2], c[2])
    assert_computes(calling(**options), OPERATION, backend, (image, text), found=actual)


@pytest.mark.property("extreme values")
@on_every_backend
@both_ways
@pytest.mark.parametrize("size", [1e30, -1e30, 3e38])
def test_huge_scores(backend, device, dtype, combine, size):
    """Softmax of scores near the end of float32: one position takes it all, and nothing overflows."""
    image = torch.eye(8, device=device, dtype=dtype).expand(2, 8, 8).clone()
    text = torch.linspace(0.25, 1, 8, device=device, dtype=dtype).mul(size).expand(2, 8).clone()
    _, weights = mmk.spatial_attention(image, text, combine=combine, scale=1.0, need_weights=True, backend=backend)
    winner = 7 if size > 0 else 0
    assert torch.equal(weights, torch.eye(8, device=device)[winner].expand(2, 1, 8))
    result, *grads = gradients(mmk.spatial_attention, (image, text), combine=combine, scale=1.0, backend=backend)
    expected = torch.zeros_like(result)
    expected[..., winner] = 1
    if combine == "multiply":
        expected[:, [n for n in range(8) if n != winner]] = 0
    assert torch.equal(result, expected)
    assert all(bool(grad.isfinite().all()) for grad in grads) or abs(size) > 1e38


@on_every_backend
def test_equal_scores(backend, device, dtype):
    """A text of zeros: every position weighs the same, also when the positions end in the middle of a vector."""
    for n in (1, 2, 3, 7, 8, 9, 31, 33, 100):
        image = draw(2, n, 5, dtype=dtype, device=device)
        _, weights = mmk.spatial_attention(image, image.new_zeros(2, 5), need_weights=True, backend=backend)
        truth = torch.full_like(weights, 1 / n, dtype=torch.float64)
        assert_rule(weights, truth, peer=truth.to(dtype))


# Memory ---------------------------------------------------------------------------------------------------------------


def window_of(shape, dtype, device, order=None):
    """A tensor of guard values, and a view of `shape` inside it; `order` is the dimensions' order in memory."""
    order = order or tuple(range(len(shape)))
    base = torch.full([shape[d] + 4 for d in order], 7, dtype=dtype, device=device)
    inner = base[(slice(2, -2),) * len(shape)]
    return base, inner.permute([order.index(d) for d in range(len(shape))])


OUTS = {
    "bnd": ((2, 17, 19), None),
    "bnd transposed": ((2, 17, 19), (0, 2, 1)),
    "bnd batch last": ((2, 17, 19), (1, 2, 0)),
    "bdhw": ((2, 19, 3, 5), None),
    "bdhw channels_last": ((2, 19, 3, 5), (0, 2, 3, 1)),
    "bdhw transposed": ((2, 19, 3, 5), (0, 1, 3, 2)),
    "packed": ((17, 19), None),
    "packed transposed": ((17, 19), (1, 0)),
}


@pytest.mark.property("out=")
@on_every_backend_and_dtype
@both_ways
@pytest.mark.parametrize("name", OUTS)
def test_out_writes_all_of_itself_and_nothing_else(backend, device, dtype, combine, name):
    shape, order = OUTS[name]
    options = {"combine": combine, "layout": "bdhw" if len(shape) == 4 else "bnd"}
    if len(shape) == 2:
        options["offsets"] = torch.tensor([0, 9, 9, 17], device=device)
    batch = 3 if len(shape) == 2 else 2
    image = draw(*shape, dtype=dtype, device=device)
    text = draw(batch, 19, dtype=dtype, device=device, seed=1)
    fresh = mmk.spatial_attention(image, text, backend=backend, **options)
    base, out = window_of(fresh.shape, dtype, device, order if combine == "multiply" else None)
    out.fill_(float("nan"))
    result, weights = mmk.spatial_attention(image, text, out=out, need_weights=True, backend=backend, **options)
    assert result is out
    assert_computes(calling(need_weights=True, **options), OPERATION, backend, (image, text), found=(out, weights))
    out.fill_(7)
    assert bool((base == 7).all())


@pytest.mark.property("out=")
@on_every_backend_and_dtype
@pytest.mark.parametrize("shape", [(3, 37, 40), (3, 40, 5, 7), (64, 20)])
def test_out_may_be_the_image(backend, device, dtype, shape):
    options = {"layout": "bdhw" if len(shape) == 4 else "bnd"}
    if len(shape) == 2:
        options["offsets"] = torch.tensor([0, 9, 9, 64], device=device)
    image = draw(*shape, dtype=dtype, device=device)
    text = draw(3, shape[1] if len(shape) != 3 else shape[2], dtype=dtype, device=device, seed=1)
    for candidate in (image.clone(), image.clone().mT.contiguous().mT):
        assert mmk.spatial_attention(candidate, text, out=candidate, backend=backend, **options) is candidate
        assert_computes(calling(**options), OPERATION, backend, (image, text), found=candidate)


@pytest.mark.property("out=")
@pytest.mark.threads
@on_every_backend
def test_large_out(backend, device, dtype):
    """Large enough for streaming stores, at every alignment."""
    if cases.is_slow(backend, device):
        pytest.skip("a large case")
    image = draw(2, 3000, 515, dtype=dtype, device=device)
    text = draw(2, 515, dtype=dtype, device=device, seed=1)
    expected = mmk.spatial_attention(image, text, backend=backend)
    for start in range(4):
        base = torch.full((image.numel() + 8,), 7.0, device=device)
        out = base[start : start + image.numel()].view(image.shape)
        mmk.spatial_attention(image, text, out=out, backend=backend)
        assert torch.equal(out, expected)
        assert bool((base[:start] == 7).all()) and bool((base[start + image.numel() :] == 7).all())


@contextmanager
def allocations():
    """A list that holds, afterwards, the bytes of every tensor allocation made inside."""
    sizes = []
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield sizes
    sizes += [
        e.typed[1].alloc_size
        for e in _flat(profiler.profiler.kineto_results.experimental_event_tree())
        if e.tag == torch._C._profiler._EventType.Allocation and e.typed[1].alloc_size > 0
    ]


def _flat(events):
    for event in events:
        yield event
        yield from _flat(event.children)


VIEWS = {
    "bnd": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: t.repeat(1, 2, 1)[:, ::2],
    "bdhw": lambda t: t.mT.contiguous().unflatten(2, (20, 50)),
    "channels_last": lambda t: t.unflatten(1, (20, 50)).permute(0, 3, 1, 2),
    "packed": lambda t: t.flatten(0, 1),
}


@pytest.mark.property("bounded memory")
@pytest.mark.parametrize("view", VIEWS)
@both_ways
def test_memory(extension, view, combine):
    """Nothing but results and O(B N) is allocated: no copy of a strided input, no temporary of the image's size."""
    image = VIEWS[view](draw(2, 1000, 64)).requires_grad_()
    text = draw(2, 64, seed=1).requires_grad_()
    options = {"combine": combine, "backend": "cpu", "layout": "bdhw" if image.dim() == 4 else "bnd"}
    if image.dim() == 2:
        options["offsets"] = torch.tensor([0, 700, 2000])
    result_bytes = image.numel() * 4 if combine == "multiply" else text.numel() * 4
    small = 3 * 2 * 1000 * 4 + 10_000  # a few numbers a position
    with allocations() as sizes:
        result = mmk.spatial_attention(image, text, **options)
    assert result_bytes <= sum(sizes) <= result_bytes + small
    upstream = draw(*result.shape)
    with allocations() as sizes:
        torch.autograd.grad(result, (image, text), upstream)
    assert image.numel() * 4 <= sum(sizes) <= image.numel() * 4 + small
    if combine == "multiply":
        with torch.no_grad(), allocations() as sizes:
            mmk.spatial_attention(image, text, out=result.detach(), **options)
        assert sum(sizes) <= small


@pytest.mark.property("strided offsets")
@on_every_backend
@both_ways
def test_strided_offsets(backend, device, dtype, combine):
    """Bounds that are a column of a table."""
    image = draw(13, 6, dtype=dtype, device=device)
    text = draw(2, 6, dtype=dtype, device=device, seed=1)
    table = torch.tensor([[0, 99], [5, 99], [13, 99]], device=device)
    strided, dense = (
        gradients(mmk.spatial_attention, (image, text), offsets=offsets, combine=combine, backend=backend)
        for offsets in (table[:, 0], table[:, 0].contiguous())
    )
    assert all(torch.equal(a, e) for a, e in zip(strided, dense))


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 36, 20)], ids=str)
@both_ways
def test_far_apart(backend, device, dtype, shape, dim, combine):
    """Strides beyond 2^31 elements from sample to sample, position to position (the mask has both), channel to
    channel."""
    tensors = draw(*shape, dtype=dtype, device=device), draw(shape[0], shape[2], dtype=dtype, device=device, seed=1)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
    mask[0, 1] = False
    call = lambda function, *t: function(*t[:2], mask=t[2], combine=combine)
    assert_strides_may_be_huge(call, OPERATION, backend, [*tensors, mask], dim, device)
    if combine == "multiply":
        image = far_apart(tensors[0], dim)
        out = far_apart(tensors[0], dim).fill_(float("nan"))
        mmk.spatial_attention(image, tensors[1], mask=mask, out=out, backend=backend)
        near = out.clone(memory_format=torch.contiguous_format)
        assert_computes(calling(mask=mask), OPERATION, backend, tensors, found=near)


@pytest.mark.property("huge strides")
@pytest.mark.threads
@on_every_backend
@pytest.mark.parametrize("layout", ["bnd", "packed", "bdhw"])
def test_more_than_2_31_elements(backend, device, dtype, layout):
    """One row expanded to so many positions that their elements can't be counted in 32 bits. It holds small integers,
    and the positions are a power of two: every sum is exact in float32, in any order."""
    if cases.is_slow(backend, device) or backend == "reference":
        pytest.skip("a large case")
    n, d = 2**20, 2048 + 4
    row = draw(1, 1, d, dtype=dtype, device=device).mul(3).round()
    text = draw(1, d, dtype=dtype, device=device, seed=1).mul(3).round()
    image, options = row.expand(1, n, d), {}
    if layout == "packed":
        image = image[0]
        options = {"offsets": torch.tensor([0, n], device=device)}
    elif layout == "bdhw":
        image = row.mT[..., None].expand(1, d, 1, n)
        options = {"layout": "bdhw"}
    result, weights = mmk.spatial_attention(image, text, combine="pool", need_weights=True, backend=backend, **options)
    assert torch.equal(weights, torch.full_like(weights, 1 / n)) and torch.equal(result, row[0])


# How PyTorch sees it --------------------------------------------------------------------------------------------------

OPCHECKS = {
    "multiply": ((2, 7, 6), None, None, 0.5, 2, False, False),
    "pool": ((2, 7, 6), True, None, 0.5, 1, True, True),
    "bdhw": ((2, 6, 3, 5), True, None, 0.5, 2, False, False),
    "packed": ((9, 6), None, (0, 4, 9), 0.5, 1, False, True),
    "packed pool": ((9, 6), True, (0, 4, 9), 0.5, 3, True, False),
}


def op_arguments(name, requires_grad=True):
    shape, mask, offsets, *options = OPCHECKS[name]
    if mask is not None:
        grid = shape[:1] if len(shape) == 2 else shape[:2] if len(shape) == 3 else (shape[0], *shape[2:])
        mask = torch.arange(torch.Size(grid).numel()).view(grid) % 3 > 0
    image = draw(*shape).requires_grad_(requires_grad)
    text = draw(2, 6, seed=1).requires_grad_(requires_grad)
    return image, text, mask, None if offsets is None else torch.tensor(offsets), *options


@pytest.mark.property("opcheck", "out=")
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck_out(extension, name):
    image, text, *rest = op_arguments(name, requires_grad=False)
    out = torch.zeros_like(text if rest[4] else image)
    torch.library.opcheck(torch.ops.mmkernels.spatial_attention_out.default, (image, text, *rest, out))


@pytest.mark.property("compile", "out=")
@on_every_backend
def test_compile_out(backend, device, dtype):
    image, text, mask = inputs(dtype, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, t, o: mmk.spatial_attention(i, t, out=o, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out = torch.full_like(image, float("nan"))
    compiled(image, text, out)
    assert_computes(calling(), OPERATION, backend, (image, text), found=out)


@pytest.mark.property("meta and fake")
@on_every_backend
@both_ways
def test_meta(backend, device, dtype, combine):
    """Shapes without data."""
    if backends.why_not(backend, OPERATION, "meta", dtype) is not None:
        pytest.skip("not on meta tensors")
    image = torch.empty(3, 5, 8, device="meta")
    text = torch.empty(3, 8, device="meta")
    result, weights = mmk.spatial_attention(
        image, text, combine=combine, num_heads=2, need_weights=True, backend=backend
    )
    assert result.shape == ((3, 8) if combine == "pool" else (3, 5, 8)) and weights.shape == (3, 2, 5)
    assert result.device.type == weights.device.type == "meta"


@pytest.mark.property("vmap")
@on_every_backend
@both_ways
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (2, 1, 1), (1, 0, None)])
def test_vmap(backend, device, dtype, combine, in_dims):
    """Mapped over any argument, along any dimension: the same as a loop."""

    def argument(shape, dim, seed):
        return draw(*(shape if dim is None else (*shape[:dim], 4, *shape[dim:])), dtype=dtype, device=device, seed=seed)

    image = argument((2, 7, 6), in_dims[0], 0)
    text = argument((2, 6), in_dims[1], 1)
    mask = argument((2, 7), in_dims[2], 2) > -0.5
    call = lambda function, i, t, m: function(i, t, mask=m, num_heads=2, combine=combine, need_weights=True)
    assert_vmap(call, in_dims, OPERATION, backend, (image, text, mask))


@pytest.mark.property("autocast")
@on_every_backend
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, device, dtype, narrow):
    """As SDPA: the inputs are rounded to autocast's dtype; gradients come back in the inputs' own."""
    image, text, mask = inputs(dtype, device)
    image.requires_grad_(), text.requires_grad_()
    with torch.autocast(device, dtype=narrow):
        result, weights = mmk.spatial_attention(image, text, mask=mask, need_weights=True, backend=backend)
        mixed = mmk.spatial_attention(image, text.to(narrow), mask=mask, backend=backend)
        same = torch.nn.functional.scaled_dot_product_attention(image, image, image)
    assert result.dtype == mixed.dtype == same.dtype == narrow and weights.dtype == torch.float32
    expected = mmk.spatial_attention(image.to(narrow), text.to(narrow), mask=mask, backend=backend)
    assert torch.equal(result, expected) and torch.equal(mixed, expected)
    grads = torch.autograd.grad(result.float().sum(), (image, text))
    assert [grad.dtype for grad in grads] == [dtype, dtype] and all(bool(grad.isfinite().all()) for grad in grads)


def test_default_backend_is_the_fastest_that_can_run(extension):
    image, text, mask = inputs()
    default = mmk.spatial_attention(image, text, mask=mask)
    assert torch.equal(default, mmk.spatial_attention(image, text, mask=mask, backend="cpu"))
