"""channel_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from support.attention_tests import (
    assert_computes,
    assert_module,
    assert_right,
    assert_strides_may_be_huge,
    call,
    draw,
    gradients,
)
from support.runnable import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import cases

OPERATION = "channel_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, cases.DTYPES))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 13, 20, 7)):
    """image, text, weight, bias."""
    *image, channels, text = shape
    sizes = ((*image, channels), (image[0], text), (channels, channels + text), (channels,))
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("weights")
@on_every_backend_and_dtype
def test_weights_sum_to_one(backend, device, dtype):
    image, text, weight, bias = inputs(dtype, device)
    result, weights = mmk.channel_attention(image, text, weight, bias, need_weights=True, backend=backend)
    assert weights.dtype == result.dtype == dtype and weights.shape == result.shape == image.shape
    # 20 weights below 1, each rounded to dtype once: half an epsilon each at most. In float32 the sum of exponentials
    # is rounded, too.
    assert ((weights.double().sum(-1) - 1).abs() <= 20 * torch.finfo(dtype).eps).all()


@on_every_backend
def test_the_text_matters(backend, device, dtype):
    """Over channels the text changes every position's weights; over positions it would cancel."""
    image, text, weight, bias = inputs(dtype, device)
    _, first = mmk.channel_attention(image, text, weight, bias, need_weights=True, backend=backend)
    _, second = mmk.channel_attention(image, text + 1, weight, bias, need_weights=True, backend=backend)
    assert ((first - second).abs().amax(-1) > 1e-3).all()


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (2, 108, 16, 7)], ids=str)
@pytest.mark.parametrize("dim", range(3))
def test_far_apart(backend, device, dtype, shape, dim):
    """Strides beyond 2^31 elements from sample to sample, row to row, channel to channel; in the weight from row to
    row, column to column."""
    assert_strides_may_be_huge(
        functools.partial(call, need_weights=True), OPERATION, backend, inputs(dtype, device, shape), dim, device
    )


@on_every_backend
def test_no_positions(backend, device, dtype):
    """[B, D] is [B, 1, D]."""
    image, text, weight, bias = inputs(dtype, device, (5, 1, 20, 7))
    run = functools.partial(mmk.channel_attention, need_weights=True, backend=backend)
    for flat, full in zip(run(image[:, 0], text, weight, bias), run(image, text, weight, bias)):
        assert torch.equal(flat, full[:, 0])


@pytest.mark.property("the autograd Function")
@on_every_backend
def test_function(backend, device, dtype):
    tensors = inputs(dtype, device)
    found = gradients(lambda *t: mmk.ChannelAttentionFunction.apply(*t, False, 0, backend)[0], tensors)
    compute = lambda function, *t: gradients(function, t)
    assert_computes(compute, OPERATION, backend, tensors, found=found)


@pytest.mark.property("opcheck")
@pytest.mark.parametrize("need_weights, kept_rows", [(True, 0), (False, 0), (True, 7)])
def test_opcheck(extension, need_weights, kept_rows):
    arguments = [t.requires_grad_() for t in inputs()]
    torch.library.opcheck(torch.ops.mmkernels.channel_attention.default, (*arguments, need_weights, kept_rows))


@pytest.mark.property("autocast")
@on_every_backend
def test_autocast(backend, device, dtype):
    """As a Linear in its place: low precision in, low precision out."""
    tensors = inputs(dtype, device)
    with torch.autocast(device, torch.bfloat16):
        result = mmk.channel_attention(*tensors, backend=backend)
    assert result.dtype == torch.bfloat16
    assert_computes(call, OPERATION, backend, [t.bfloat16() for t in tensors], found=result)


@pytest.mark.property("autocast")
@on_every_backend
@pytest.mark.parametrize("text", [7, 300])
def test_autocast_changes_nothing_inside(backend, device, dtype, text):
    """What comes in float32 isn't rounded on the way: the same bits, and the same gradients when autocast is on
    backward. (A text's product is the library's where it isn't small.)"""
    tensors = inputs(dtype, device, (2, 13, 20, text))
    run = lambda *t: mmk.ChannelAttentionFunction.apply(*t, False, 0, backend)[0]
    plain = gradients(run, tensors)
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(run, tensors), plain)) or backend == "reference"


@pytest.mark.property("the module")
def test_module(extension):
    torch.manual_seed(0)
    module = mmk.ChannelAttention(24, 10)
    image = draw(2, 30, 24)
    text = draw(2, 10, seed=1)
    assert_module(lambda m, image, text: m(image, text, need_weights=True), module, (image, text))
    article = lambda m, image, text: (
        image * torch.softmax(m.score_projection(torch.cat([image, text[:, None].expand(-1, 30, -1)], -1)), -1)
    )
    assert_module(article, module, (image, text), found=module(image, text))
