"""What the operations are tested for, on every backend that can run here.

What isn't exact is judged by the rule of :mod:`mmkernels.tolerance`: a `call` or `compute` takes the operation as its
first argument, and what it gives with a backend is compared with what it gives with the reference in float64; the plain
peer's error is the measure.
"""

import contextlib
import copy
import functools

import pytest
import torch

import mmkernels as mmk
from mmkernels import cases, peers, reference, tolerance


@functools.lru_cache(maxsize=8)
def _standard(operation, case, dtype, device):
    return tolerance.Standard(operation, case, dtype, device)


def assert_right(operation, case, dtype, device, backend):
    """The backends of a case and dtype follow each other: they share its truth."""
    assert_meets(_standard(operation, case, dtype, device), operation, backend)


def standard_of(operation, arguments):
    """What the operation has to give of arguments of one's own, by name; they stay where they lie."""
    first = next(iter(arguments.values()))
    return tolerance.Standard(
        operation, cases.Case("given", "given", lambda draw: arguments, True), first.dtype, first.device
    )


def assert_meets(standard, operation, backend):
    """The backend gives what it has to; returns it, by name."""
    found = tolerance.evaluate(getattr(mmk, operation), standard.arguments, names=standard.names, backend=backend)
    assert_passed(standard.judge(found))
    return found


def assert_computes(compute, operation, backend, tensors, found=None, cancels=False):
    """``compute(function, *tensors)``, a tensor or several, is right when `function` is the operation on `backend`.

    What was computed may be given as well: then `compute` must be that very computation. Arguments that aren't floating
    point (masks, offsets) stay as they are. A result with as many entries along dimension 0 as the first tensor, where
    that has three dimensions or more, is judged entry by entry: a large sample must not hide a small one. `cancels`:
    sums are small beside their terms, and the inputs' own last bit counts.
    """
    tensors = list(tensors)
    if found is None:
        found = compute(functools.partial(getattr(mmk, operation), backend=backend), *tensors)
    plain = functools.partial(compute, getattr(peers, operation))
    truth = compute(getattr(reference, operation), *_cast(tensors, torch.float64))
    wide = any(t.dtype == torch.float64 for t in outputs(found))
    narrow = plain(*_cast(tensors, torch.float32)) if wide else None
    rounded = compute(getattr(reference, operation), *map(tolerance.half_an_epsilon_off, tensors)) if cancels else None
    batch = len(tensors[0]) if tensors[0].dim() > 2 else None
    assert_rule(found, truth, plain(*tensors), narrow, batch=batch, rounded=rounded)


def assert_module(compute, module, tensors, found=None):
    """``compute(module, *tensors)`` is right: the truth is the same module in float64 on the reference, the measure its
    error in float32."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if hasattr(part, "backend"):
            part.backend = "reference"
    found = compute(module, *tensors) if found is None else found
    peer = compute(plain, *tensors)
    assert_rule(found, compute(plain.double(), *_cast(tensors, torch.float64)), peer, batch=len(tensors[0]))


def assert_rule(found, truth, peer, narrow=None, batch=None, rounded=None):
    """Tensors, or tuples of them, under the rule. `truth` is float64, `narrow` the peer in float32 where `found` is
    float64, `rounded` the truth where inputs are half an epsilon off. Those of `batch` entries along dimension 0 are
    judged entry by entry."""
    found, truth, peer = map(outputs, (found, truth, peer))
    narrow, rounded = ([None] * len(found) if t is None else outputs(t) for t in (narrow, rounded))
    assert len(found) == len(truth) == len(peer) == len(narrow) == len(rounded)
    assert_passed(
        [
            tolerance.compare(f"output {i}", *each, samples=each[1].dim() > 1 and len(each[1]) == batch, rounded=off)
            for i, (*each, off) in enumerate(zip(found, truth, peer, narrow, rounded))
        ]
    )


def assert_passed(verdicts):
    wrong = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert not wrong, "\n".join(wrong)


def outputs(found):
    """What a function gives, one tensor or several, as a list."""
    return [t.detach() for t in (found if isinstance(found, (tuple, list)) else (found,)) if t is not None]


def _cast(tensors, dtype):
    return [t.detach().to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@contextlib.contextmanager
def deterministic(wanted):
    """With or without deterministic algorithms; the suite's own setting, which fills fresh memory, comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def negative(tensor):
    """The same values, kept negated: PyTorch makes such views of conjugates' imaginary parts."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def call(function, *tensors, **options):
    """The plainest of calls."""
    return function(*tensors, **options)


def gradients(function, tensors, **options):
    """The results, and the gradients of their weighted sum."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    results = function(*tensors, **options)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [draw(*r.shape, device=r.device, seed=9 + i).to(r.dtype) for i, r in enumerate(results)]
    return *(r.detach() for r in results), *torch.autograd.grad(results, tensors, upstream)


def assert_gradients(found, call, operation, tensors):
    """`found` is what :func:`gradients` gives of ``call(function, *tensors)``."""
    assert_computes(
        lambda function, *t: gradients(functools.partial(call, function), t), operation, None, tensors, found=found
    )


def assert_vmap(call, dims, operation, backend, tensors):
    """``torch.func.vmap`` over these dimensions of the tensors gives what one call after another gives."""

    def looped(function, *tensors):
        size = next(t.shape[dim] for t, dim in zip(tensors, dims) if dim is not None)
        entries = [[t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims)] for i in range(size)]
        found = [call(function, *entry) for entry in entries]
        return [torch.stack(each) for each in zip(*found)] if isinstance(found[0], tuple) else torch.stack(found)

    run = functools.partial(call, functools.partial(getattr(mmk, operation), backend=backend))
    assert_computes(looped, operation, backend, tensors, found=torch.func.vmap(run, tuple(dims))(*tensors))


def far_apart(tensor, dim):
    """A copy whose elements along `dim` lie so far apart that the last is 3 * 2^30 elements away: not only it is beyond
    31 bits, but the last block of twelve rows, too. The memory between is only virtual: nobody touches it."""
    strides = list(tensor.movedim(dim, 0).contiguous().movedim(0, dim).stride())
    strides[dim] = 3 * 2**30 // (tensor.shape[dim] - 1)
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides))
    return torch.empty(length, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def assert_strides_may_be_huge(call, operation, backend, tensors, dim, device):
    """Whatever has a dimension `dim` is far apart there, gradients that come in, too. Masks may be among the
    tensors."""
    if device != "cpu":
        pytest.skip("needs virtual memory")

    def run(function, *tensors, move=torch.clone):
        given = [move(t.detach()).requires_grad_(t.is_floating_point()) for t in tensors]
        results = call(function, *given)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [move(draw(*r.shape, seed=9 + i).to(r.dtype)) for i, r in enumerate(results)]
        return *(r.detach() for r in results), *torch.autograd.grad(
            results, [t for t in given if t.requires_grad], upstream
        )

    found = run(
        functools.partial(getattr(mmk, operation), backend=backend),
        *tensors,
        move=lambda t: far_apart(t, dim) if dim < t.dim() and t.shape[dim] > 1 else t.clone(),
    )
    assert_computes(run, operation, backend, tensors, found=found)
