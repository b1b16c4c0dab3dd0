"""bidirectional_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from attention_tests import (
    assert_compiles,
    assert_gradients,
    assert_module,
    assert_right,
    assert_strides_may_be_huge,
    assert_upstream_may_lie_anyhow,
    assert_vmap,
    call,
    draw,
    gradients,
)
from conftest import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import cases

OPERATION = "bidirectional_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, cases.DTYPES))
in_float64 = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, [torch.float64]))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 3, 13, 11, 8, 6)):
    b, h, n, t, d, dv = shape
    sizes = ((b, h, n, d), (b, h, t, d), (b, h, n, dv), (b, h, t, dv))
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("gradcheck", "second derivatives")
@in_float64
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(backend, device, dtype, masked):
    """First and second derivatives against differences of values."""
    tensors = [t.requires_grad_() for t in inputs(dtype, device, (2, 2, 4, 3, 3, 2))]
    masks = (
        {
            "image_mask": torch.arange(8, device=device).view(2, 4) % 3 > 0,
            "text_mask": torch.arange(6, device=device).view(2, 3) % 3 > 0,
        }
        if masked
        else {}
    )
    run = functools.partial(mmk.bidirectional_attention, backend=backend, **masks)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.property("masked values reach nothing")
@on_every_backend_and_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_values_reach_nothing(backend, device, dtype, poison):
    """The same as zeros at what is masked out."""
    query, key, image_value, text_value = inputs(dtype, device)
    masks = {
        "image_mask": torch.arange(26, device=device).view(2, 13) % 3 > 0,
        "text_mask": torch.arange(22, device=device).view(2, 11) % 4 > 0,
    }
    image, text = (~m[:, None, :, None] for m in masks.values())
    run = functools.partial(mmk.bidirectional_attention, backend=backend, **masks)
    dirty, clean = (
        gradients(
            run,
            (
                query.masked_fill(image, value),
                key.masked_fill(text, value),
                image_value.masked_fill(image, value),
                text_value.masked_fill(text, value),
            ),
        )
        for value in (poison, 0)
    )
    for i, hidden in enumerate(
        (None, None, image, text, image, text)
    ):  # what a masked query or key is told of itself is its own affair
        a, e = (t if hidden is None else t.masked_fill(hidden, 0) for t in (dirty[i], clean[i]))
        assert torch.equal(a, e) and bool(a.isfinite().all())


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


@pytest.mark.property("gradients that come in")
@on_every_backend
def test_upstream_gradients(backend, device, dtype):
    assert_upstream_may_lie_anyhow(call, OPERATION, backend, inputs(dtype, device))


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


@pytest.mark.property("compile")
@on_every_backend
def test_compile(backend, device, dtype):
    assert_compiles(
        call,
        OPERATION,
        backend,
        [inputs(dtype, device, shape) for shape in ((2, 3, 13, 11, 8, 6), (3, 3, 29, 17, 8, 6))],
    )


@pytest.mark.property("opcheck")
def test_opcheck(extension):
    torch.library.opcheck(
        torch.ops.mmkernels.bidirectional_attention.default, (*(t.requires_grad_() for t in inputs()), None, None, 0.5)
    )


@pytest.mark.property("the module")
def test_module(extension):
    torch.manual_seed(0)
    masks = {"image_mask": torch.arange(60).view(2, 30) % 4 > 0, "text_mask": torch.arange(14).view(2, 7) % 4 > 0}
    module = mmk.BidirectionalAttention(24, 10, 12, 3)
    assert_module(lambda m, image, text: m(image, text, **masks), module, (draw(2, 30, 24), draw(2, 7, 10, seed=1)))
