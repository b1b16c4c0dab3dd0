"""What the operations are tested for, on every backend that can run here."""

import copy
import functools

import pytest
import torch

import mmkernels as mmk
from mmkernels import cases, peers, reference, tolerance


def assert_right(operation, function, case, dtype, device, backend):
    """A backend's function is right on a case."""
    assert_passed(standard(operation, case.name, dtype, device).test(function, backend=backend))


@functools.lru_cache(maxsize=8)
def standard(operation, name, dtype, device):
    """What a case has to give. The backends of a case follow each other (see conftest.py): a few are enough to keep."""
    return tolerance.Standard(operation, _cases(operation)[name], dtype, device)


@functools.lru_cache(maxsize=None)
def _cases(operation):
    return {case.name: case for case in cases.selected(operation)}


def assert_computes(compute, operation, backend, tensors, found=None):
    """``compute(function, *tensors)``, a tensor or several, is right by the rule of :mod:`mmkernels.tolerance` when
    `function` is the operation on `backend`: the truth is the reference in float64, the allowed error that of the plain
    peer. Arguments that aren't floating point (masks, offsets) stay as they are.

    What was computed in another way and should be the same (mapped, compiled, strided) is given as `found`.
    """
    found = _outputs(compute(on(operation, backend), *tensors) if found is None else found)
    of_reference, of_peer = (functools.partial(compute, getattr(module, operation)) for module in (reference, peers))
    truth, peer, narrow = of_reference(*_cast(tensors, torch.float64)), of_peer(*tensors), None
    if any(t.dtype == torch.float64 for t in found):
        narrow = of_peer(*_cast(tensors, torch.float32))
    assert_rule(found, truth, peer, narrow, batch=len(tensors[0]) if tensors[0].dim() > 2 else None)


def assert_rule(found, truth, peer, narrow=None, batch=None):
    """Each tensor of `found` is right; `truth`, `peer` and `narrow` are those of :func:`mmkernels.tolerance.compare`.
    Where a tensor has `batch` entries along dimension 0, each is judged on its own."""
    found, truth, peer = (_outputs(tensors) for tensors in (found, truth, peer))
    narrow = [None] * len(found) if narrow is None else _outputs(narrow)
    assert len(found) == len(truth) == len(peer) == len(narrow)
    assert_passed([tolerance.compare(f"output {i}", *each, samples=each[1].dim() > 1 and len(each[1]) == batch)
                   for i, each in enumerate(zip(found, truth, peer, narrow))])


def assert_module_right(make, compute):
    """``compute(module, cast)`` is right for ``make(backend=None)``, which is returned; ``cast(tensor)`` brings inputs
    to the module's dtype. The truth is the same module on the reference in float64, the allowed error that of the
    reference in float32."""
    torch.manual_seed(0)
    fused, plain = make(backend=None), make(backend="reference")
    plain.load_state_dict(fused.state_dict())
    found, peer = (compute(module, lambda tensor: tensor) for module in (fused, plain))
    assert_rule(found, compute(copy.deepcopy(plain).double(), lambda tensor: tensor.double()), peer)
    return fused


def assert_passed(verdicts):
    assert all(v.passed for v in verdicts), "\n".join(str(v) for v in verdicts if not v.passed)


def _outputs(found):
    return [t.detach() for t in (found if isinstance(found, (tuple, list)) else (found,))]


def _cast(tensors, dtype):
    return [t.detach().to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def on(operation, backend):
    """The public operation on a backend."""
    return functools.partial(getattr(mmk, operation), backend=backend)


def gradients(function, tensors, upstream=tolerance.upstream_like, **options):
    """The results, and the gradients of what is floating point among the tensors; ``upstream(i, result)`` flows into
    the i-th result."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    results = function(*tensors, **options)
    results = results if isinstance(results, tuple) else (results,)
    grads = [upstream(i, r) for i, r in enumerate(results)]
    return *(r.detach() for r in results), *torch.autograd.grad(results, [t for t in tensors if t.requires_grad], grads)


def gradients_one_by_one(function, tensors):
    """The gradients that :func:`gradients` gives, each asked for alone."""
    return [gradients(lambda t: function(*tensors[:i], t, *tensors[i + 1:]), [tensor])[-1]
            for i, tensor in enumerate(tensors)]


# Ways to call a function, ``call(function, *tensors)``: what assert_computes calls `compute`.

def calling(**options):
    return lambda function, *tensors: function(*tensors, **options)


def differentiating(call, upstream=tolerance.upstream_like):
    """Results and gradients of a call."""
    return lambda function, *tensors: gradients(functools.partial(call, function), tensors, upstream)


def differentiating_squares(call, arguments):
    """The gradients of the sum of a result's squares for some arguments, by torch.func."""
    return lambda function, *tensors: torch.func.grad(lambda *t: call(function, *t).square().sum(), arguments)(*tensors)


def looping(call, dims):
    """What ``torch.func.vmap(..., dims)`` of a call should give, one after another."""
    def run(function, *tensors):
        size = next(t.shape[dim] for t, dim in zip(tensors, dims) if dim is not None)
        entries = [[t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims)] for i in range(size)]
        found = [call(function, *entry) for entry in entries]
        return [torch.stack(each) for each in zip(*found)] if isinstance(found[0], tuple) else torch.stack(found)
    return run


def assert_vmap(call, dims, operation, backend, tensors):
    """Mapped over these dimensions of the tensors, a call gives what a loop gives."""
    mapped = torch.func.vmap(functools.partial(call, on(operation, backend)), dims)
    assert_computes(looping(call, dims), operation, backend, tensors, found=mapped(*tensors))


# How a gradient may lie: expanded (what sum() sends back), one row for all, with NaN between its elements, turned.
LAYOUTS = {
    "expanded": lambda t: torch.ones_like(t[(0,) * t.dim()]).expand_as(t),
    "one row": lambda t: t[:, :1].expand_as(t),
    "strided": lambda t: torch.stack([t, t.new_full(t.shape, float("nan"))], -1)[..., 0],
    "turned": lambda t: t.mT.contiguous().mT,
}


def assert_upstream_may_lie_anyhow(call, operation, backend, tensors):
    """Gradients that come in expanded, strided or turned give what contiguous ones give."""
    run = functools.partial(call, on(operation, backend))
    for lay in LAYOUTS.values():
        strided = lambda i, result: lay(tolerance.upstream_like(i, result))
        contiguous = lambda i, result: strided(i, result).clone(memory_format=torch.contiguous_format)
        assert_computes(differentiating(call, contiguous), operation, backend, tensors,
                        found=gradients(run, tensors, strided))


def far_apart(tensor, dim):
    """A copy whose elements along `dim` lie so far apart that the last is 3 * 2^30 elements away: not only it is beyond 31 bits,
    but the last block of twelve rows, too. The memory between is only virtual: nobody touches it."""
    if dim >= tensor.dim() or tensor.shape[dim] == 1:
        return tensor
    strides = list(tensor.movedim(dim, 0).contiguous().movedim(0, dim).stride())
    strides[dim] = 3 * 2**30 // (tensor.shape[dim] - 1)
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides))
    return torch.empty(length, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def assert_strides_may_be_huge(call, operation, backend, tensors, dim, device):
    """What contiguous tensors give, where all that have a dimension `dim` are far apart there, incoming gradients, too.
    Masks may be among the tensors."""
    if device != "cpu":
        pytest.skip("needs virtual memory")
    run = functools.partial(call, on(operation, backend))
    found = gradients(run, [far_apart(t, dim) for t in tensors],
                      lambda i, result: far_apart(tolerance.upstream_like(i, result), dim))
    assert_computes(differentiating(call), operation, backend, tensors, found=found)
