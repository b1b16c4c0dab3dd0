"""What holds of every operation, in each of its forms, on every backend: values, gradients, masks. How PyTorch sees it
is shown by test_conformance_torch.py; tests/coverage_table.py lists all properties."""

import pytest
import torch
from support.attention_tests import assert_rule, draw, outputs
from support.calls import VARIANTS, function_of, parameters, tensors_of

import mmkernels as mmk
from mmkernels import cases

on_every_backend = pytest.mark.parametrize("backend, device, dtype, name", parameters())
on_every_backend_and_dtype = pytest.mark.parametrize("backend, device, dtype, name", parameters(dtypes=cases.DTYPES))
in_float64 = pytest.mark.parametrize("backend, device, dtype, name", parameters(dtypes=[torch.float64]))
WEIGHTED = [name for name, variant in VARIANTS.items() if "need_weights" in variant.of()[1]]
HIDING = [name for name, variant in VARIANTS.items() if variant.hidden]


def of_size(name, backend, device, dtype=torch.float32, size="large", **changes):
    """The variant on the backend, and its tensors."""
    sizes = getattr(VARIANTS[name], size)
    run = function_of(name, mmk, device, sizes, backend=backend, **changes)
    return run, tensors_of(name, dtype, device, **sizes)


def incoming(i, result):
    """The gradient of result i."""
    return draw(*result.shape, device=result.device, seed=9 + i).to(result.dtype)


def gradients(run, tensors, *layouts, upstream=incoming):
    """Results, and the gradients of all tensors: 0 where no result depends on one. With `layouts` those of each, which
    says how the gradients that come in lie."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = run(*leaves)
    ends = [(r, upstream(i, r).to(r.dtype)) for i, r in enumerate(results) if r.requires_grad]
    found = outputs(results)
    for lay in layouts or (lambda t: t,):
        found += torch.autograd.grad(
            [r for r, _ in ends],
            leaves,
            [lay(grad) for _, grad in ends],
            retain_graph=bool(layouts),
            allow_unused=True,
            materialize_grads=True,
        )
    return found


def assert_as_defined(compute, name, backend, device, dtype=torch.float32, **sizes):
    """``compute(run, tensors)`` under the rule, where `run` is the variant; returns what the backend gives."""
    tensors = tensors_of(name, dtype, device, **sizes)
    found = compute(function_of(name, mmk, device, sizes, backend=backend), tensors)
    defined = function_of(name, device=device, sizes=sizes)
    assert_rule(found, compute(defined, [t.double() for t in tensors]), compute(defined, tensors))
    return found


def equal(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.property("gradcheck", "second derivatives", "forward mode")
@in_float64
def test_gradcheck(backend, device, dtype, name):
    """First and second derivatives in both modes against differences of values."""
    tensors = [t.requires_grad_() for t in tensors_of(name, dtype, device, **VARIANTS[name].tiny)]
    run = function_of(name, mmk, device, VARIANTS[name].tiny, backend=backend)
    forward = backend != "reference"  # whose forward mode is PyTorch's own
    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=forward, check_batched_forward_grad=forward)
    assert torch.autograd.gradgradcheck(run, tensors, check_fwd_over_rev=forward)


@pytest.mark.property("second derivatives")
@on_every_backend
def test_second_derivatives(backend, device, dtype, name):
    """The gradients of the gradients, of those that come in, too."""

    def compute(run, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        results = run(*leaves)
        ends = [incoming(i, r).requires_grad_() for i, r in enumerate(results)]
        grads = torch.autograd.grad(results, leaves, ends, create_graph=True)
        sources = [*leaves, *ends]
        return torch.autograd.grad([g.sin().sum() for g in grads], sources, allow_unused=True, materialize_grads=True)

    assert_as_defined(compute, name, backend, device)


@pytest.mark.property("each gradient alone")
@on_every_backend
def test_each_gradient_alone(backend, device, dtype, name):
    """Where only one tensor wants a gradient it has the same bits as beside the others, and the results, too."""
    run, tensors = of_size(name, backend, device, size="sizes" if cases.is_slow(backend, device) else "large")
    everything = gradients(run, tensors)
    results = everything[: -len(tensors)]
    for i in range(len(tensors)):
        one = lambda t: run(*tensors[:i], t, *tensors[i + 1 :])
        assert equal(gradients(one, tensors[i : i + 1]), (*results, everything[i - len(tensors)])), i


@pytest.mark.property("each gradient alone")
@on_every_backend
def test_gradient_of_each_result_alone(backend, device, dtype, name):
    """Only the result, or only the weights, or one of two results, goes into the loss."""
    for i in range(len(function_of(name)(*tensors_of(name)))):
        alone = lambda run, tensors: gradients(lambda *t: run(*t)[i : i + 1], tensors)
        assert_as_defined(alone, name, backend, device)


@pytest.mark.property("weights")
@pytest.mark.parametrize("backend, device, dtype, name", parameters(WEIGHTED))
def test_weights_change_nothing_else(backend, device, dtype, name):
    """The same bits of the result and of its gradients with and without need_weights; weights need no gradient where
    nothing else does."""
    with_weights, tensors = of_size(name, backend, device)
    without, _ = of_size(name, backend, device, need_weights=False)
    found, expected = (gradients(lambda *t: run(*t)[:1], tensors) for run in (with_weights, without))
    assert equal(found, expected)
    assert not with_weights(*tensors)[1].requires_grad


LAYOUTS = {
    "expanded": lambda t: torch.ones_like(t[(0,) * t.dim()]).expand_as(t),
    "expanded samples": lambda t: t[:1].expand_as(t),
    "expanded rows": lambda t: t[:, :1].expand_as(t),
    "strided": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "cut out": lambda t: torch.nn.functional.pad(t, (1, 1) * t.dim(), value=float("nan"))[(slice(1, -1),) * t.dim()],
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
}


@pytest.mark.property("gradients that come in")
@on_every_backend
def test_gradients_that_come_in_may_lie_anyhow(backend, device, dtype, name):
    """As sum() sends them back, and as views of other tensors."""
    compute = lambda run, tensors: gradients(run, tensors, *LAYOUTS.values())
    assert_as_defined(compute, name, backend, device, **VARIANTS[name].large)


# Masks, NaN and Inf --------------------------------------------------------------------------------------------------


def hidden_places(name, device, sizes):
    """Of each tensor where a mask hides its elements; None where it has none."""
    shapes, options = VARIANTS[name].of(**sizes)
    hidden = VARIANTS[name].hidden
    return [hidden[t][1](options[hidden[t][0]]).to(device) if t in hidden else None for t in shapes]


def filled(tensors, places, value):
    return [t if where is None else t.masked_fill(where, value) for t, where in zip(tensors, places)]


@pytest.mark.property("masked values reach nothing")
@pytest.mark.parametrize("backend, device, dtype, name", parameters(HIDING, cases.DTYPES))
def test_masked_values_reach_nothing(backend, device, dtype, name):
    """With NaN, Inf and -Inf there the same bits as with zeros, in results and gradients, and all of them finite; the
    gradient that comes in may be poisoned there, too."""
    run, tensors = of_size(name, backend, device, dtype)
    places = hidden_places(name, device, VARIANTS[name].large)

    def computed(value):
        def upstream(i, result):
            grad = incoming(i, result)
            return grad.masked_fill(places[0], value) if result.shape == tensors[0].shape else grad

        return gradients(run, filled(tensors, places, value), upstream=upstream)

    clean = computed(0)
    results = len(clean) - len(tensors)
    for poison in (float("nan"), float("inf"), float("-inf")):
        for i, (found, expected) in enumerate(zip(computed(poison), clean)):
            # What a masked query or key is told of itself is its own affair.
            where = None if i < results else places[i - results]
            found, expected = filled((found, expected), (where, where), 0)
            assert torch.equal(found, expected) and bool(found.isfinite().all()), (poison, i)


@pytest.mark.property("nothing takes part")
@pytest.mark.parametrize("backend, device, dtype, name", parameters(HIDING, cases.DTYPES))
def test_nothing_takes_part(backend, device, dtype, name):
    """Everything masked out, and NaN there: exactly 0 everywhere, gradients included."""
    shapes, options = VARIANTS[name].of()
    masks = {mask for mask, _ in VARIANTS[name].hidden.values()}
    nothing = {mask: torch.zeros_like(options[mask]).to(device) for mask in masks}
    tensors = tensors_of(name, dtype, device)
    run = function_of(name, mmk, device, backend=backend, **nothing)
    poisoned = [t.fill_(float("nan")) if tensor in VARIANTS[name].hidden else t for tensor, t in zip(shapes, tensors)]
    assert not any(bool(t.any()) for t in gradients(run, poisoned))


@pytest.mark.property("NaN stays in its sample")
@on_every_backend
def test_nan_stays_in_its_sample(backend, device, dtype, name):
    """The other samples' results and gradients keep their bits; a parameter's gradient is everybody's."""
    shapes, options = VARIANTS[name].of()
    dimensions = [dims.split()[0] for dims in VARIANTS[name].shapes.values()]
    packed = "offsets" in options
    tensors = tensors_of(name, dtype, device)
    run = function_of(name, mmk, device, backend=backend)
    first = 3 if packed else 1  # rows of the first bag, or one sample
    rows = {"B": 1, "N": first, "bags": 1}

    def poisoned(t, dimension):
        """NaN in the last sample, in the last bag's last row."""
        t = t.clone()
        if dimension in rows:
            t[-1] = float("nan")
        return t

    found, expected = (gradients(run, given) for given in (list(map(poisoned, tensors, dimensions)), tensors))
    results = len(found) - len(tensors)
    for i, (f, e) in enumerate(zip(found, expected)):
        if i >= results and dimensions[i - results] not in rows:
            continue
        if i < results and packed:
            weights = i == 1
            pooled = f.shape[0] == len(options["offsets"]) - 1
            f, e = (t[..., :first] if weights else t[:1] if pooled else t[:first] for t in (f, e))
        else:
            kept = 1 if i < results else rows[dimensions[i - results]]
            f, e = f[:kept], e[:kept]
        assert torch.equal(f, e) and bool(f.isfinite().all()), i
