"""What the operations are tested for, on every backend that can run here."""

import functools

import pytest
import torch

import mmkernels as mmk
from mmkernels import peers, reference, tolerance


def assert_right(operation, function, case, dtype, device, backend):
    verdicts = tolerance.Standard(operation, case, dtype, device).test(function, backend=backend)
    wrong = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert not wrong, "\n".join(wrong)


def assert_computes(compute, operation, backend, tensors, found=None):
    """``compute(function, *tensors)``, a tensor or several, is right under the rule of :mod:`mmkernels.tolerance` when `function` is the operation
    on `backend`: the truth is the reference in float64, the allowed error that of the plain peer. What was computed may be given as well:
    then `compute` must be that very computation. Arguments that aren't floating point (masks, offsets) stay as they are."""
    found = _outputs(compute(functools.partial(getattr(mmk, operation), backend=backend), *tensors)) if found is None else _outputs(found)
    truth = _outputs(compute(getattr(reference, operation), *(_cast(t, torch.float64) for t in tensors)))
    peer = _outputs(compute(getattr(peers, operation), *tensors))
    wide = any(t.dtype == torch.float64 for t in found)
    narrow = _outputs(compute(getattr(peers, operation), *(_cast(t, torch.float32) for t in tensors))) if wide else [None] * len(found)
    assert len(found) == len(truth) == len(peer)
    verdicts = [tolerance.compare(f"output {i}", *each) for i, each in enumerate(zip(found, truth, peer, narrow))]
    assert all(v.passed for v in verdicts), "\n".join(str(v) for v in verdicts if not v.passed)


def _outputs(found):
    return [t.detach() for t in (found if isinstance(found, (tuple, list)) else (found,))]


def _cast(value, dtype):
    return value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradients(function, tensors, **options):
    """The results, and the gradients of their weighted sum."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*tensors, **options)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [draw(*r.shape, dtype=r.dtype, device=r.device, seed=9 + i) for i, r in enumerate(results)]
    return *(r.detach() for r in results), *torch.autograd.grad(results, tensors, upstream)


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol)


def assert_upstream_may_lie_anyhow(function, tensors):
    """Gradients that come expanded (what sum() sends back), strided or turned give what contiguous ones give."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    plain = [draw(*r.shape, dtype=r.dtype, device=r.device, seed=9 + i) for i, r in enumerate(results)]
    layouts = [[torch.ones_like(t[(0,) * t.dim()]).expand_as(t) for t in plain], [t[:, :1].expand_as(t) for t in plain],
               [torch.stack([t, t.new_full(t.shape, float("nan"))], -1)[..., 0] for t in plain], [t.mT.contiguous().mT for t in plain]]
    for upstream in layouts:
        found, expected = (torch.autograd.grad(results, tensors, up, retain_graph=True) for up in (upstream, [up.contiguous() for up in upstream]))
        assert_close(found, expected)


def far_apart(tensor, dim):
    """A copy whose elements along `dim` lie so far apart that the last is 3 * 2^30 elements away: not only it is beyond 31 bits,
    but the last block of twelve rows, too. The memory between is only virtual: nobody touches it."""
    strides = list(tensor.movedim(dim, 0).contiguous().movedim(0, dim).stride())
    strides[dim] = 3 * 2**30 // (tensor.shape[dim] - 1)
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides))
    return torch.empty(length, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def assert_strides_may_be_huge(function, tensors, dim, device):
    """Whatever has a dimension `dim` is far apart there, gradients that come in, too: what contiguous tensors give. Masks may be among them."""
    if device != "cpu":
        pytest.skip("needs virtual memory")

    def run(move):
        given = [move(t.detach()).requires_grad_(t.is_floating_point()) for t in tensors]
        results = function(*given)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [move(draw(*r.shape, dtype=r.dtype, seed=9 + i)) for i, r in enumerate(results)]
        return *(r.detach() for r in results), *torch.autograd.grad(results, [t for t in given if t.requires_grad], upstream)

    assert_close(run(lambda t: far_apart(t, dim) if dim < t.dim() and t.shape[dim] > 1 else t.clone()), run(torch.clone))
