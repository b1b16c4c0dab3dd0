"""absorbed_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from support.attention_tests import (
    assert_gradients,
    assert_meets,
    assert_module,
    assert_right,
    assert_strides_may_be_huge,
    assert_vmap,
    call,
    draw,
    gradients,
    standard_of,
)
from support.runnable import runnable, runnable_cases

import mmkernels as mmk
from mmkernels import backends

OPERATION = "absorbed_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 3, 13, 11, 8, 6)):
    b, h, n, t, d, dv = shape
    sizes = ((b, n, d), (b, h, t, d), (b, h, t, dv))
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


def beyond_float16(dtype, what, tokens):
    """Text in float32 with numbers that float16 hasn't, and results that it has: a channel of keys where the image is
    small, or values of tokens that hardly count."""
    image, key, value = inputs(shape=(2, 3, 40, tokens, 24, 16))
    bias = draw(2, 3, tokens, seed=5)
    key *= 0.2
    if what == "keys":
        image *= 2**-3
        image[..., 0] *= 2**-13
        key[:, 0, 1, 0] = 2**17
        value *= 2**-6
    else:
        value[:, :, 0] *= 2**18
        bias[:, :, 0] -= 6
    return {"image": image.to(dtype), "key": key, "value": value, "key_bias": bias}


@pytest.mark.parametrize("tokens", [11, 70])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, (torch.float16,)))
def test_text_beyond_float16(backend, device, dtype, what, tokens):
    arguments = {name: t.to(device) for name, t in beyond_float16(dtype, what, tokens).items()}
    assert_meets(standard_of(OPERATION, arguments), OPERATION, backend)


@pytest.mark.property("the autograd Function", "vmap", "same bits twice")
@pytest.mark.threads
@on_every_backend
def test_function_vmap_and_twice(backend, device, dtype):
    tensors = inputs(dtype, device)
    run = functools.partial(mmk.absorbed_attention, backend=backend)
    first = gradients(run, tensors)
    second = gradients(run, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    apply = lambda x, k, v: mmk.AbsorbedAttentionFunction.apply(x, k, None, v, None, None, True, backend)[:2]
    assert_gradients(gradients(apply, tensors), call, OPERATION, tensors)
    stacked = [torch.stack([t, t + 1]) for t in tensors]
    assert_vmap(call, (0,) * 3, OPERATION, backend, stacked)


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("shape", [(2, 2, 2, 2, 2, 2), (2, 3, 36, 11, 8, 6)], ids=str)
@pytest.mark.parametrize("dim", range(3))
def test_far_apart(backend, device, dtype, shape, dim):
    """Strides beyond 2^31 elements from sample to sample, row to row (head to head), and channel to channel (row to
    row); masks have the first two."""
    masks = [draw(shape[0], size, seed=7) > -0.5 for size in shape[2:4]]
    masked = lambda function, *t: function(*t[:3], image_mask=t[3], text_mask=t[4])
    assert_strides_may_be_huge(masked, OPERATION, backend, [*inputs(dtype, device, shape), *masks], dim, device)


@pytest.mark.property("the module")
@pytest.mark.parametrize("absorb", [None, False, True])
def test_module(extension, absorb):
    torch.manual_seed(0)
    module = mmk.AttentionPooling(24, 3, num_queries=5, out_dim=10, embed_dim=12, absorb=absorb)
    mask = torch.arange(60).view(2, 30) % 4 > 0
    assert_module(lambda m, image: m(image, image_mask=mask), module, (draw(2, 30, 24),))


@pytest.mark.threads
@pytest.mark.property("bounded memory")
def test_long_image_takes_no_score_matrix(extension):
    """100,000 positions, 4 heads of 16 tokens: the only temporaries that grow with them are the softmaxes' rows."""
    tensors = inputs(shape=(1, 4, 100_000, 16, 32, 32))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        results = mmk.absorbed_attention(*tensors, backend="cpu")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert allocated < 1.3 * sum(r.nbytes for r in results)


@pytest.mark.property("opcheck", "opcheck backward", backend="triton")
@pytest.mark.skipif(not backends.INTERPRETED, reason="mmkernels was imported without TRITON_INTERPRET=1")
def test_opcheck_of_triton():
    """The interpreter runs the registered operations as a GPU would."""
    operations = torch.ops.mmkernels
    image, key, value = inputs(shape=(1, 2, 5, 3, 4, 6))
    arguments = image, key, draw(1, 2, 3), value, draw(1, 5) > -1, draw(1, 3) > -1
    torch.library.opcheck(operations.absorbed_attention_triton.default, (*arguments, True))
    image_out, text_out, *softmax, _ = operations.absorbed_attention_triton(*arguments, True)
    torch.library.opcheck(
        operations.absorbed_attention_triton_backward.default,
        (image_out, text_out, *arguments, text_out, *softmax, True, *(True,) * 4),
    )


@pytest.mark.property("mistakes of a kernel's caller", backend="triton")
@pytest.mark.skipif(not backends.INTERPRETED, reason="mmkernels was imported without TRITON_INTERPRET=1")
@pytest.mark.parametrize("place", range(6))
def test_operation_of_triton_refuses(place):
    """A tensor that is too short, or of another dtype, is never read."""
    image, key, value = inputs(shape=(1, 2, 5, 3, 4, 6))
    arguments = [image, key, draw(1, 2, 3), value, draw(1, 5) > -1, draw(1, 3) > -1]
    for wrong in (arguments[place][:, :-1], arguments[place].to(torch.complex64)):
        with pytest.raises(RuntimeError):
            torch.ops.mmkernels.absorbed_attention_triton(*arguments[:place], wrong, *arguments[place + 1 :], True)
