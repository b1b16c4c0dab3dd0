"""bidirectional_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from support.attention_tests import (
    assert_gradients,
    assert_module,
    assert_right,
    assert_strides_may_be_huge,
    assert_vmap,
    call,
    draw,
    gradients,
)
from support.runnable import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import cases

OPERATION = "bidirectional_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, cases.DTYPES))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 3, 13, 11, 8, 6)):
    b, h, n, t, d, dv = shape
    sizes = ((b, h, n, d), (b, h, t, d), (b, h, n, dv), (b, h, t, dv))
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("nothing takes part")
@on_every_backend_and_dtype
def test_nothing_to_attend_to(backend, device, dtype):
    """Exactly 0 where the other side is masked completely."""
    tensors = inputs(dtype, device)
    image_mask = torch.ones(2, 13, dtype=torch.bool, device=device)
    text_mask = torch.ones(2, 11, dtype=torch.bool, device=device)
    image_mask[0], text_mask[1] = False, False
    image_out, text_out, *grads = gradients(
        functools.partial(mmk.bidirectional_attention, image_mask=image_mask, text_mask=text_mask, backend=backend),
        tensors,
    )
    assert not image_out[1].any() and image_out[0].any() and not text_out[0].any() and text_out[1].any()
    assert (
        all(bool(t.isfinite().all()) for t in (image_out, text_out, *grads))
        and not grads[2][0].any()
        and not grads[3][1].any()
    )


@pytest.mark.property("the autograd Function", "vmap", "same bits twice")
@pytest.mark.threads
@on_every_backend
def test_function_vmap_and_twice(backend, device, dtype):
    tensors = inputs(dtype, device)
    run = functools.partial(mmk.bidirectional_attention, scale=0.3, backend=backend)
    first = gradients(run, tensors)
    second = gradients(run, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    apply = lambda *t: mmk.BidirectionalAttentionFunction.apply(*t, None, None, 0.3, backend)[:2]
    assert_gradients(gradients(apply, tensors), functools.partial(call, scale=0.3), OPERATION, tensors)
    stacked = [torch.stack([t, t + 1]) for t in tensors]
    assert_vmap(functools.partial(call, scale=0.3), (0,) * 4, OPERATION, backend, stacked)


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("shape", [(2, 2, 2, 2, 2, 2), (2, 3, 36, 11, 8, 6)], ids=str)
@pytest.mark.parametrize("dim", range(4))
def test_far_apart(backend, device, dtype, shape, dim):
    """Strides beyond 2^31 elements from sample to sample, head to head, row to row, channel to channel; masks have the
    first two."""
    masks = [draw(shape[0], size, seed=7) > -0.5 for size in shape[2:4]]
    masked = lambda function, *t: function(*t[:4], image_mask=t[4], text_mask=t[5])
    assert_strides_may_be_huge(masked, OPERATION, backend, [*inputs(dtype, device, shape), *masks], dim, device)


@pytest.mark.property("the module")
def test_module(extension):
    torch.manual_seed(0)
    masks = {"image_mask": torch.arange(60).view(2, 30) % 4 > 0, "text_mask": torch.arange(14).view(2, 7) % 4 > 0}
    module = mmk.BidirectionalAttention(24, 10, 12, 3)
    assert_module(lambda m, image, text: m(image, text, **masks), module, (draw(2, 30, 24), draw(2, 7, 10, seed=1)))


@pytest.mark.threads
@pytest.mark.property("bounded memory")
def test_long_image_takes_no_score_matrix(extension):
    """100,000 positions, 77 tokens: the only temporaries that grow with them are the rows' sums."""
    tensors = inputs(shape=(1, 1, 100_000, 77, 16, 16))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        results = mmk.bidirectional_attention(*tensors, backend="cpu")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert allocated < 1.2 * sum(r.nbytes for r in results)
