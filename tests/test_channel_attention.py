"""channel_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from attention_tests import (assert_computes, assert_module_right, assert_right, assert_rule,
                             assert_strides_may_be_huge, assert_upstream_may_lie_anyhow, assert_vmap, calling,
                             differentiating, differentiating_squares, draw, gradients, gradients_one_by_one, on)
from conftest import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import cases

OPERATION = "channel_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, cases.DTYPES))
in_float64 = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, [torch.float64]))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 13, 20, 7)):
    """image, text, weight, bias."""
    *image, channels, text = shape
    sizes = ((*image, channels), (image[0], text), (channels, channels + text), (channels,))
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, mmk.channel_attention, case, dtype, device, backend)


@in_float64
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 4, 2)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradcheck(backend, device, dtype, shape, need_weights):
    """First and second derivatives against differences of values."""
    tensors = [t.requires_grad_() for t in inputs(dtype, device, shape)]
    run = functools.partial(mmk.channel_attention, need_weights=need_weights, backend=backend)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@on_every_backend_and_dtype
def test_weights_sum_to_one(backend, device, dtype):
    image, text, weight, bias = inputs(dtype, device)
    result, weights = mmk.channel_attention(image, text, weight, bias, need_weights=True, backend=backend)
    assert weights.dtype == result.dtype == dtype and weights.shape == result.shape == image.shape
    # Each of the D weights is rounded to its dtype, and their sum, which divides them, is off by D roundings at most.
    assert float((weights.double().sum(-1) - 1).abs().max()) <= weights.shape[-1] * torch.finfo(dtype).eps


@on_every_backend
def test_the_text_matters(backend, device, dtype):
    """Over channels the text changes every position's weights; over positions it would cancel."""
    image, text, weight, bias = inputs(dtype, device)
    _, first = mmk.channel_attention(image, text, weight, bias, need_weights=True, backend=backend)
    _, second = mmk.channel_attention(image, text + 1, weight, bias, need_weights=True, backend=backend)
    assert ((first - second).abs().amax(-1) > 1e-3).all()


@on_every_backend
def test_one_sample_does_not_reach_another(backend, device, dtype):
    """NaN and Inf stay in their sample; weight's gradient is everybody's."""
    image, text, weight, bias = inputs(dtype, device)
    clean = mmk.channel_attention(image, text, weight, bias, backend=backend)
    image[1, 3], text[1] = float("nan"), float("inf")
    dirty = mmk.channel_attention(image, text, weight, bias, backend=backend)
    assert torch.equal(dirty[0], clean[0]) and dirty[1].isnan().all()


@on_every_backend
def test_partial_gradients(backend, device, dtype):
    """Each gradient alone is the same as all together."""
    tensors = inputs(dtype, device)
    assert_computes(lambda *given: differentiating(calling())(*given)[1:], OPERATION, backend, tensors,
                    found=gradients_one_by_one(on(OPERATION, backend), tensors))


@on_every_backend
def test_upstream_gradients(backend, device, dtype):
    assert_upstream_may_lie_anyhow(calling(need_weights=True), OPERATION, backend, inputs(dtype, device))


@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (2, 108, 16, 7)], ids=str)
@pytest.mark.parametrize("dim", range(3))
def test_far_apart(backend, device, dtype, shape, dim):
    """Strides beyond 2^31 elements from sample to sample, row to row, channel to channel; in the weight from row to row, column to column."""
    tensors = inputs(dtype, device, shape)
    assert_strides_may_be_huge(calling(need_weights=True), OPERATION, backend, tensors, dim, device)


@on_every_backend
def test_no_positions(backend, device, dtype):
    """[B, D] is [B, 1, D]."""
    image, text, weight, bias = inputs(dtype, device, (5, 1, 20, 7))
    run = functools.partial(mmk.channel_attention, need_weights=True, backend=backend)
    for flat, full in zip(run(image[:, 0], text, weight, bias), run(image, text, weight, bias)):
        assert torch.equal(flat, full[:, 0])


@on_every_backend
def test_function(backend, device, dtype):
    image, text, weight, _ = inputs(dtype, device)
    shift, own = text @ weight[:, 20:].T, weight[:, :20].contiguous()
    apply = lambda *t: mmk.ChannelAttentionFunction.apply(*t, False, 0, backend)[0]
    result, grad_image, _, grad_own = gradients(apply, (image, shift, own))

    def compute(function, *tensors):
        result, grad_image, _, grad_weight = gradients(function, tensors)
        return result, grad_image, grad_weight[:, :20]

    assert_computes(compute, OPERATION, backend, [image, text, weight], found=(result, grad_image, grad_own))


@on_every_backend
@pytest.mark.parametrize("dims", [(0, 0, None, None), (0, 0, 0, 0)])
def test_vmap(backend, device, dtype, dims):
    """Over samples, and over weights, too."""
    tensors = [t if d is None else torch.stack([t, t + 1, t * 2]) for t, d in zip(inputs(dtype, device), dims)]
    for call in (calling(), differentiating_squares(calling(), (0, 1, 2))):
        assert_vmap(call, dims, OPERATION, backend, tensors)


@on_every_backend
def test_compile(backend, device, dtype):
    """One graph without a break; one compilation serves every size."""
    run = functools.partial(mmk.channel_attention, need_weights=True, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 13, 20, 7), (3, 29, 20, 7)):
            tensors = inputs(dtype, device, shape)
            assert_computes(differentiating(calling(need_weights=True)), OPERATION, backend, tensors,
                            found=gradients(compiled, tensors))


@pytest.mark.parametrize("need_weights, kept_rows", [(True, 0), (False, 0), (True, 7)])
def test_opcheck(extension, need_weights, kept_rows):
    image, text, weight, _ = inputs()
    arguments = [t.requires_grad_() for t in (image, text @ weight[:, 20:].T, weight[:, :20].contiguous())]
    torch.library.opcheck(torch.ops.mmkernels.channel_attention.default, (*(t.detach().requires_grad_() for t in arguments), need_weights, kept_rows))


@on_every_backend
def test_autocast(backend, device, dtype):
    """As a Linear in its place: low precision in, low precision out."""
    tensors = inputs(dtype, device)
    with torch.autocast(device, torch.bfloat16):
        result = mmk.channel_attention(*tensors, backend=backend)
    assert result.dtype == torch.bfloat16
    assert_computes(calling(), OPERATION, backend, [t.bfloat16() for t in tensors], found=result)


@on_every_backend
def test_autocast_changes_nothing_inside(backend, device, dtype):
    """What comes in float32 isn't rounded on the way: the same bits, and the same gradients when autocast is on backward."""
    image, text, weight, _ = inputs(dtype, device)
    run = lambda *t: mmk.ChannelAttentionFunction.apply(*t, False, 0, backend)[0]
    tensors = (image, text @ weight[:, 20:].T, weight[:, :20].contiguous())
    plain = gradients(run, tensors)
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(run, tensors), plain)) or backend == "reference"


@on_every_backend
def test_same_bits_twice(backend, device, dtype):
    first, second = (gradients(functools.partial(mmk.channel_attention, backend=backend), inputs(dtype, device, (3, 700, 40, 7))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_module(extension):
    image, text = draw(2, 30, 24), draw(2, 10, seed=1)
    fused = assert_module_right(functools.partial(mmk.ChannelAttention, 24, 10),
                                lambda module, cast: module(cast(image), cast(text), need_weights=True))

    def article(image, text):
        scores = fused.score_projection(torch.cat([image, text[:, None].expand(-1, 30, -1)], -1))
        return image * torch.softmax(scores, -1)

    found, peer = fused(image, text), article(image, text)
    fused.double()
    assert_rule(found, article(image.double(), text.double()), peer)
