"""gated_cross_attention: the same tests on every backend that can run here."""

import functools

import pytest
import torch
from support.attention_tests import (
    assert_computes,
    assert_gradients,
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

OPERATION = "gated_cross_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, cases.DTYPES))


def inputs(dtype=torch.float32, device="cpu", shape=(2, 3, 13, 11, 8, 6)):
    b, h, n, t, d, dv = shape
    sizes = ((b, h, n, d), (b, h, t, d), (b, h, t, dv), (b, h, n, dv))
    return [draw(*size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize("backend, device, dtype, case", runnable_cases(OPERATION))
def test_case(backend, device, dtype, case):
    assert_right(OPERATION, case, dtype, device, backend)


@pytest.mark.property("nothing takes part")
@on_every_backend_and_dtype
def test_nothing_to_attend_to(backend, device, dtype):
    """Exactly 0, gradients too, though the query and its gate are NaN."""
    query, key, value, gate = inputs(dtype, device)
    mask = torch.ones(2, 1, 13, 11, dtype=torch.bool, device=device)
    mask[1, :, 4] = False
    query[1, :, 4] = float("nan")
    gate[1, :, 4] = float("nan")
    found = gradients(
        functools.partial(mmk.gated_cross_attention, attn_mask=mask, backend=backend), (query, key, value, gate)
    )
    assert all(bool(t.isfinite().all()) for t in found)
    result, grad_query, _, _, grad_gate = found
    assert (
        not result[1, :, 4].any()
        and not grad_query[1, :, 4].any()
        and not grad_gate[1, :, 4].any()
        and result[1, :, 3].any()
    )


@pytest.mark.property("masks")
@on_every_backend
def test_mask_forms(backend, device, dtype):
    """bool, the same expanded, and the same as -Inf."""
    tensors = inputs(dtype, device)
    mask = torch.arange(22, device=device).view(2, 11) % 3 > 0
    for other in (
        mask,
        mask[:, None, None].expand(2, 3, 13, 11),
        torch.zeros(2, 1, 1, 11, device=device).masked_fill(~mask[:, None, None], float("-inf")),
    ):
        found = gradients(functools.partial(mmk.gated_cross_attention, attn_mask=other, backend=backend), tensors)
        assert_gradients(found, functools.partial(call, attn_mask=mask), OPERATION, tensors)


@pytest.mark.property("masks")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1), (2, 1, 13, 1), (2, 3, 13, 1), (2, 1), (1,), ()], ids=str)
@on_every_backend_and_dtype
def test_a_mask_that_all_tokens_share_has_no_gradient(backend, device, dtype, shape):
    mask = torch.randn(shape, device=device).requires_grad_()
    arguments = [x.requires_grad_() for x in inputs(dtype, device)]
    result = mmk.gated_cross_attention(*arguments, attn_mask=mask, backend=backend)
    found = torch.autograd.grad(result, [mask, *arguments], torch.ones_like(result))
    assert not found[0].any() and found[0].shape == mask.shape
    assert all(each.any() for each in found[1:])


@pytest.mark.property("views")
@on_every_backend
def test_views_of_projections(backend, device, dtype):
    """The result of views of [B, N, H * d] is one again."""
    query, key, value, gate = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(dtype, device))
    result = mmk.gated_cross_attention(query, key, value, gate, backend=backend)
    if backend != "reference":
        assert result.transpose(1, 2).is_contiguous()
    assert_computes(call, OPERATION, backend, (query, key, value, gate), found=result)


@pytest.mark.property("weights")
@on_every_backend
def test_need_weights(backend, device, dtype):
    tensors = inputs(dtype, device)
    mask = draw(2, 11, device=device) > 0
    run = lambda function, *t: gradients(functools.partial(function, attn_mask=mask, need_weights=True), t)
    assert_computes(run, OPERATION, backend, tensors)


@pytest.mark.property("the autograd Function")
@on_every_backend
def test_function(backend, device, dtype):
    tensors = inputs(dtype, device)
    apply = lambda *t: mmk.GatedCrossAttentionFunction.apply(*t, None, None, None, 0.3, True, backend)[0]
    assert_gradients(gradients(apply, tensors), functools.partial(call, scale=0.3), OPERATION, tensors)


@pytest.mark.property("huge strides")
@pytest.mark.virtual_memory
@on_every_backend
@pytest.mark.parametrize("shape", [(2, 2, 2, 2, 2, 2), (2, 3, 36, 11, 8, 6)], ids=str)
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("mask", ["BT", "BHNT", "float"])
def test_far_apart(backend, device, dtype, shape, dim, mask):
    """Strides beyond 2^31 elements from sample to sample, head to head, row to row, channel to channel."""
    values = draw(*(shape[0], shape[3]) if mask == "BT" else shape[:4], seed=7)
    mask = values if mask == "float" else values > -0.5
    masked = lambda function, *t: function(*t[:4], attn_mask=t[4])
    assert_strides_may_be_huge(masked, OPERATION, backend, [*inputs(dtype, device, shape), mask], dim, device)


@pytest.mark.property("bounded memory")
@pytest.mark.threads
def test_long_image_takes_no_score_matrix(extension):
    """100,000 positions, 77 tokens, no temporary that grows with them but the rows' sums."""
    tensors = inputs(shape=(1, 1, 100_000, 77, 16, 16))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = mmk.gated_cross_attention(*tensors, backend="cpu")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert allocated < 1.2 * result.nbytes
    last = [t[:, :, -50:] if len(t[0, 0]) == 100_000 else t for t in tensors]
    assert_computes(call, OPERATION, "cpu", last, found=result[:, :, -50:])


@pytest.mark.property("the module")
@pytest.mark.parametrize("norm", [False, True])
def test_module(extension, norm):
    torch.manual_seed(0)
    module = mmk.GatedCrossAttention(24, 10, 3, norm=torch.nn.LayerNorm(24) if norm else None)
    mask = torch.arange(14).view(2, 7) % 4 > 0
    assert_module(
        lambda m, image, text: m(image, text, mask=mask, need_weights=True),
        module,
        (draw(2, 30, 24), draw(2, 7, 10, seed=1)),
    )
    with pytest.raises(ValueError, match="num_heads must be at least 1 and divide embed_dim = 24, got 5"):
        mmk.GatedCrossAttention(24, 10, 5)
