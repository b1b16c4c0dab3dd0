"""Forward mode: every way to push tangents through every operation gives the reference's, or raises; none drops
them."""

import functools

import pytest
import torch
from support.attention_tests import assert_rule, draw
from support.calls import VARIANTS, function_of, parameters, tensors_of
from support.runnable import runnable
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._pytree import tree_leaves

import mmkernels as mmk
from mmkernels import backends, cases

on_every_backend = pytest.mark.parametrize("backend, device, dtype, name", parameters())
of_every_operation = pytest.mark.parametrize(
    "backend, device, dtype, name",
    parameters(("spatial", "channel flat", "gated pairs", "bidirectional", "additive packed")),
)


def loss(function):
    return lambda *tensors: sum(r.square().sum() for r in function(*tensors))


def tangent(tensor):
    """None is 0: what doesn't depend on anything that moves."""
    primal, moved = forward_ad.unpack_dual(tensor)
    return torch.zeros_like(primal) if moved is None else moved


def dual(function, tensors, tangents, requires_grad=False):
    """What a dual level gives. A tangent may be None."""
    with forward_ad.dual_level():
        tensors = [t.clone().requires_grad_(requires_grad) for t in tensors]
        results = function(*(t if v is None else forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents)))
        return tuple(map(tangent, results))


def dual_of_one(function, tensors, tangents, which):
    return dual(function, tensors, [v if i == which % len(tangents) else None for i, v in enumerate(tangents)])


def mapped(function, tensors, tangents):
    """Several tangents at once."""
    several = [torch.stack([v, 2 * v]) for v in tangents]
    return vmap(lambda *v: jvp(function, tensors, v)[1])(*several)


def of_mapped(function, tensors, tangents):
    several, moving = ([torch.stack([t, 2 * t]) for t in ts] for ts in (tensors, tangents))
    return jvp(vmap(function), tuple(several), tuple(moving))[1]


def over_reverse(function, tensors, tangents):
    """The tangent of a gradient, outside of torch.func."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone().requires_grad_(), v) for t, v in zip(tensors, tangents)]
        grads = torch.autograd.grad(loss(function)(*duals), duals)
        return tuple(map(tangent, grads))


WAYS = {
    "jvp": lambda function, tensors, tangents: jvp(function, tensors, tangents)[1],
    "dual": dual,
    "dual of leaves": functools.partial(dual, requires_grad=True),
    "dual of the first": functools.partial(dual_of_one, which=0),
    "dual of the last": functools.partial(dual_of_one, which=-1),
    "linearize": lambda function, tensors, tangents: linearize(function, *tensors)[1](*tangents),
    "vmap of jvp": mapped,
    "jvp of vmap": of_mapped,
    "over reverse": over_reverse,
    "jacfwd": lambda function, tensors, tangents: jacfwd(function)(*tensors),
    "hessian": lambda function, tensors, tangents: hessian(loss(function))(*tensors),
    "reverse over forward": lambda function, tensors, tangents: jacrev(jacfwd(loss(function)))(*tensors),
    "forward over forward": lambda function, tensors, tangents: jacfwd(jacfwd(loss(function)))(*tensors),
}


def assert_pushed(way, found, name, tensors, tangents):
    """`found` is what the way gives for the reference in float64; the measure is its error in the same dtype."""
    run = function_of(name, device=tensors[0].device)
    wide = (tuple(t.double() for t in ts) for ts in (tensors, tangents))
    assert_rule(*map(tree_leaves, (found, way(run, *wide), way(run, tensors, tangents))))


def takes(backend, device, way):
    """The reference is plain PyTorch, and what is executed for correctness alone is slow: they take a few."""
    return way in ("jvp", "dual", "vmap of jvp", "over reverse") or not (
        backend == "reference" or cases.is_slow(backend, device)
    )


@pytest.mark.property("forward mode")
@pytest.mark.parametrize(
    "backend, device, dtype, name, way",
    [
        pytest.param(*combination.values, way, id=f"{way}-{combination.id}")
        for way in WAYS
        for combination in parameters()
        if takes(*combination.values[:2], way)
    ],
)
def test_ways(backend, device, dtype, name, way):
    tensors = tensors_of(name, dtype, device)
    tangents = tensors_of(name, dtype, device, seed=20)
    found = WAYS[way](function_of(name, mmk, device, backend=backend), tensors, tangents)
    assert_pushed(WAYS[way], found, name, tensors, tangents)


@on_every_backend
def test_nothing_moves(backend, device, dtype, name):
    """A dual level without duals changes no bit and makes no tangent."""
    tensors = tensors_of(name, dtype, device)
    run = function_of(name, mmk, device, backend=backend)
    expected = run(*tensors)
    with forward_ad.dual_level():
        found = run(*tensors)
        assert all(torch.equal(f, e) and forward_ad.unpack_dual(f).tangent is None for f, e in zip(found, expected))


@on_every_backend
def test_values_are_the_kernels_own(backend, device, dtype, name):
    tensors = tensors_of(name, dtype, device)
    run = function_of(name, mmk, device, backend=backend)
    values, _ = jvp(run, tensors, tensors)
    assert all(torch.equal(v, e) for v, e in zip(values, run(*tensors)))


# Compiled
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.property("forward mode", "compile")
@of_every_operation
def test_compiled(backend, device, dtype, name):
    """Duals go into a compiled graph; a level is opened inside one."""
    tensors = tensors_of(name, dtype, device)
    tangents = tensors_of(name, dtype, device, seed=20)
    run = function_of(name, mmk, device, backend=backend)

    def inside(tensors, tangents):
        with forward_ad.dual_level():
            results = run(*(forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents)))
            return tuple(map(tangent, results))

    torch._dynamo.reset()
    for found in (
        dual(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors, tangents),
        torch.compile(inside, fullgraph=True, backend="aot_eager")(tensors, tangents),
    ):
        assert_pushed(dual, found, name, tensors, tangents)


@of_every_operation
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_jvp(backend, device, dtype, name, fullgraph):
    """Right, or raised: torch.compile doesn't trace an autograd Function's jvp, and leaves it to Python where it
    may."""
    tensors = tensors_of(name, dtype, device)
    tangents = tensors_of(name, dtype, device, seed=20)
    run = function_of(name, mmk, device, backend=backend)
    torch._dynamo.reset()
    try:
        found = torch.compile(lambda t, v: jvp(run, t, v)[1], fullgraph=fullgraph, backend="aot_eager")(
            tensors, tangents
        )
    except torch._dynamo.exc.Unsupported:
        assert fullgraph
        return
    assert_pushed(WAYS["jvp"], found, name, tensors, tangents)


# The registered operations
# ---------------------------------------------------------------------------------------------


def raw(name, backend, tensors):
    """The registered operation that the public function calls, and its arguments."""
    operation = VARIANTS[name].operation
    run = backends.choose(operation, tensors[0], backend)
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return run(*arguments)

    record.backend = run.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose", lambda *_: record)
        function_of(name, mmk, tensors[0].device, backend=backend)(*tensors)
    return run.forward, [a.contiguous() if isinstance(a, torch.Tensor) else a for a in calls[0]]


@pytest.mark.property("forward mode")
@on_every_backend
def test_registered_operation(backend, device, dtype, name):
    """Called by itself it has its tangents, too. torch.func's transforms can't reach its rules: that is an error, not a
    result without."""
    if backend == "reference":
        pytest.skip("not a registered operation")
    tensors = tensors_of(name, dtype, device)
    operation, arguments = raw(name, backend, tensors)
    moving = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    tangents = [draw(*arguments[i].shape, dtype=dtype, device=device, seed=i) for i in moving]

    of_reference = backends.choose(VARIANTS[name].operation, tensors[0], "reference").forward
    outputs = sum(r is not None for r in of_reference(*arguments))  # without what only a backward pass wants

    def run(function, *moved):
        given = dict(zip(moving, moved))
        return function(*(given.get(i, a) for i, a in enumerate(arguments)))[:outputs]

    def pushed(function, dtype=dtype):
        with forward_ad.dual_level():
            results = run(
                function, *(forward_ad.make_dual(arguments[i].to(dtype), v.to(dtype)) for i, v in zip(moving, tangents))
            )
            return tuple(map(tangent, results))

    found = pushed(operation)
    assert_rule(found, pushed(of_reference, torch.float64), pushed(of_reference))
    with pytest.raises(RuntimeError, match="torch.func"):
        jvp(functools.partial(run, operation), tuple(arguments[i] for i in moving), tuple(tangents))


@pytest.mark.parametrize("backend, device, dtype", runnable("spatial_attention"))
def test_out_is_refused(backend, device, dtype):
    """What is written into can't carry the tangent; nor may the registered operation drop it."""
    image = draw(2, 4, 6, device=device)
    text = draw(2, 6, device=device, seed=1)
    run = backends.choose("spatial_attention", image, backend)
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(image, image)
        with pytest.raises(ValueError, match="out is for inference only, but .* tangent"):
            mmk.spatial_attention(moving, text, out=torch.empty_like(image), backend=backend)
        if backend != "reference":
            with pytest.raises(RuntimeError, match="for inference only"):
                run.into(moving, text, None, None, 1.0, 1, False, False, torch.empty_like(image))
