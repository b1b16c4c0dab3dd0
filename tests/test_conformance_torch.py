"""How PyTorch sees every operation, in each of its forms, on every backend: transforms, compilation, dispatch, memory,
threads. What they compute is shown by test_conformance.py."""

import functools
import re
import threading

import pytest
import torch
from support.attention_tests import assert_rule
from support.calls import MAIN, VARIANTS, function_of, parameters, tensors_of
from support.runnable import runnable
from test_conformance import equal, gradients, incoming, of_size
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmkernels as mmk
from mmkernels import cases, functional

on_every_backend = pytest.mark.parametrize("backend, device, dtype, name", parameters())
of_every_main_variant = pytest.mark.parametrize("backend, device, dtype, name", parameters(MAIN))


# Transforms ----------------------------------------------------------------------------------------------------------


def mapped(run, tensors, dims):
    return torch.func.vmap(run, dims)(*tensors)


def looped(run, tensors, dims):
    """What :func:`mapped` means."""
    size = next(t.shape[dim] for t, dim in zip(tensors, dims) if dim is not None)
    entries = [[t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims)] for i in range(size)]
    return [torch.stack(each) for each in zip(*(run(*entry) for entry in entries))]


def assert_mapped(make, name, backend, device, dims):
    """vmap of ``make(run)`` over these dimensions of the tensors gives what one call after another gives."""
    tensors = [t if d is None else torch.stack([t, t + 0.1, t * 2], d) for t, d in zip(tensors_of(name), dims)]
    narrow = [t.to(device, torch.float32) for t in tensors]
    defined = make(function_of(name, device=device))
    found = mapped(make(function_of(name, mmk, device, backend=backend)), narrow, dims)
    truth = looped(defined, [t.double() for t in narrow], dims)
    assert_rule(found, truth, looped(defined, narrow, dims))


@pytest.mark.property("vmap")
@on_every_backend
def test_vmap(backend, device, dtype, name):
    """Over all tensors, over the first along its last dimension, over all but the first, over the last alone."""
    tensors = tensors_of(name)
    n = len(tensors) - 1
    for dims in ((0,) * (n + 1), (tensors[0].dim(), *(None,) * n), (None, *(1,) * n), (*(None,) * n, 0)):
        assert_mapped(lambda run: run, name, backend, device, dims)


@pytest.mark.property("torch.func.grad")
@on_every_backend
def test_per_sample_gradients(backend, device, dtype, name):
    """torch.func.grad under vmap, for the first tensor's samples and for those of all."""
    n = len(tensors_of(name))
    squares = lambda run: lambda *tensors: sum(r.square().sum() for r in run(*tensors))
    for dims in ((0,) * n, (0, *(None,) * (n - 1))):
        assert_mapped(lambda run: torch.func.grad(squares(run), tuple(range(n))), name, backend, device, dims)


# Compilation ---------------------------------------------------------------------------------------------------------


def in_compiled(name):
    """The operation as a function of two dicts: all that has a size comes from outside."""
    function = getattr(mmk, VARIANTS[name].operation)

    def run(tensors, options):
        results = function(**tensors, **options)
        return tuple(r for r in results if r is not None) if isinstance(results, tuple) else (results,)

    return run


def assert_compiled(compiled, name, backend, device, sizes):
    shapes, options = VARIANTS[name].of(**sizes)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    tensors = tensors_of(name, torch.float32, device, **sizes)
    run = lambda *given: compiled(dict(zip(shapes, given)), options | {"backend": backend})
    defined = function_of(name, device=device, sizes=sizes)
    truth = gradients(defined, [t.double() for t in tensors])
    assert_rule(gradients(run, tensors), truth, gradients(defined, tensors))


@pytest.mark.property("compile")
@pytest.mark.parametrize(
    "backend, device, dtype, name",
    # The sizes of all backends' results come from one place: that of the CPU's stands for the rest.
    [p for p in parameters() if p.values[0] == "cpu" or p.values[3] in MAIN],
)
def test_compile_without_recompiling(backend, device, dtype, name):
    """One graph without a break; one compilation serves every batch size and length."""
    torch._dynamo.reset()
    compiled = torch.compile(in_compiled(name), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ({"B": 4, "N": 13, "T": 11}, {"B": 3, "N": 29, "T": 17}):
            assert_compiled(compiled, name, backend, device, sizes)


@pytest.mark.property("compile")
@pytest.mark.parametrize(
    "backend, device, dtype, name", parameters([name for name in VARIANTS if name not in MAIN], slow=())
)
def test_compile_static(backend, device, dtype, name):
    torch._dynamo.reset()
    compiled = torch.compile(in_compiled(name), fullgraph=True, dynamic=False, backend="aot_eager")
    assert_compiled(compiled, name, backend, device, {})


@pytest.mark.slow
@pytest.mark.property("inductor", operation=functional.__all__)
@pytest.mark.parametrize("backend", [p.values[0] for p in runnable("spatial_attention") if p.values[1] == "cpu"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(backend, dynamic):
    """All operations through the default compiler, between others, in one graph, forward and backward."""
    names = [name for name in MAIN if "packed" not in name]

    def model(runs, *tensors):
        """Each operation gets its own of the tensors."""
        left = list(tensors)
        results = []
        for name in names:
            given = [left.pop(0) for _ in VARIANTS[name].shapes]
            results.append(runs[name](given[0] * 2, *(t.tanh() for t in given[1:]))[0].relu().sum(1))
        return tuple(results)

    sizes = {"B": 3, "N": 8, "T": 5} if dynamic else {}
    runs = {name: function_of(name, mmk, "cpu", sizes, backend=backend) for name in names}
    defined = functools.partial(model, {name: function_of(name, sizes=sizes) for name in names})
    tensors = [t for name in names for t in tensors_of(name, torch.float32, **sizes)]
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(model, runs), fullgraph=True, dynamic=dynamic)
    assert_rule(
        gradients(compiled, tensors),
        gradients(defined, [t.double() for t in tensors]),
        gradients(defined, tensors),
    )


# Dispatch ------------------------------------------------------------------------------------------------------------


def registered_calls(run, tensors, needs):
    """(operation, its arguments), forward and backward, where the tensors that `needs` names want gradients."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            if called.namespace == "mmkernels":
                found.append((called, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
            return called(*args, **(kwargs or {}))

    found = []
    leaves = [t.clone().requires_grad_(i in needs) for i, t in enumerate(tensors)]
    with Record():
        results = run(*leaves)
        ends = [(r, incoming(i, r)) for i, r in enumerate(results) if r.requires_grad]
        torch.autograd.grad([r for r, _ in ends], [leaves[i] for i in needs], [g for _, g in ends])
    return found


# The last compiles, which takes a hundred times as long as the rest.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TRACED = [*MAIN, "spatial pool", "spatial planes", "spatial packed"]


def assert_opcheck(called, arguments, differentiable, checks=OPCHECKS):
    """Those of the arguments that are inputs, or gradients that come in, want gradients."""
    names = [argument.name for argument in called._schema.arguments]
    given = [
        a.requires_grad_() if n in differentiable and isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for n, a in zip(names, arguments)
    ]
    torch.library.opcheck(called, tuple(given), test_utils=checks)


@pytest.mark.property("opcheck", "opcheck backward")
@pytest.mark.parametrize(
    "backend, device, dtype, name",
    [p for p in parameters() if p.values[0] not in ("reference", "triton")],  # Triton's are in test_triton*.py
)
def test_opcheck(backend, device, dtype, name):
    """What the public function calls, forward and backward, where all gradients are wanted, and where one is."""
    tensors = tensors_of(name, dtype, device)
    run = function_of(name, mmk, device, backend=backend)
    (forward, given), (backward, back) = registered_calls(run, tensors, range(len(tensors)))
    inputs = {argument.name for argument in forward._schema.arguments}
    grads = {argument.name for argument in backward._schema.arguments if argument.name.startswith("grad_")}
    traced = name in TRACED and not cases.is_slow(backend, device)
    checks = OPCHECKS if traced else OPCHECKS[:-1]
    assert_opcheck(forward, given, inputs, checks)
    assert_opcheck(backward, back, inputs | grads, checks)
    for i in range(len(tensors)):  # an unwanted gradient is empty and has no derivative
        _, (backward, back) = registered_calls(run, tensors, [i])
        assert_opcheck(backward, back, (), checks if i < 2 else OPCHECKS[:-1])


@pytest.mark.property("autocast")
@pytest.mark.parametrize(
    "backend, device, dtype, name, narrow",
    [
        pytest.param(*p.values, narrow, id=f"{p.id}-{str(narrow).removeprefix('torch.')}")
        for p in parameters()
        for narrow in (torch.bfloat16, torch.float16)
        if narrow == torch.bfloat16 or not cases.is_slow(*p.values[:2])
    ],
)
def test_autocast(backend, device, dtype, name, narrow):
    """Low precision in, low precision out; gradients come back in the inputs' own dtypes."""
    tensors = tensors_of(name, dtype, device)
    run = function_of(name, mmk, device, backend=backend)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast(device, narrow):
        results = run(*leaves)
    defined = function_of(name, device=device)
    rounded = [t.to(narrow) for t in tensors]
    assert_rule(results, defined(*(t.double() for t in rounded)), defined(*rounded))
    assert results[0].dtype == narrow
    grads = torch.autograd.grad(sum(r.float().sum() for r in results), leaves, allow_unused=True)
    assert all(g is None or (g.dtype == dtype and bool(g.isfinite().all())) for g in grads)


@pytest.mark.property("inference mode")
@on_every_backend
def test_inference_mode(backend, device, dtype, name):
    run, tensors = of_size(name, backend, device)
    expected = run(*tensors)
    with torch.inference_mode():
        found = run(*tensors)
    assert equal(found, expected) and all(r.is_inference() for r in found)


@pytest.mark.property("checkpoint")
@pytest.mark.parametrize("use_reentrant", [False, True])
@on_every_backend
def test_checkpoint(backend, device, dtype, name, use_reentrant):
    """What is computed again for the backward pass is the same, packed bags' included."""
    run = function_of(name, mmk, device, backend=backend)
    found = []
    for compute in (run, lambda *t: checkpoint(run, *t, use_reentrant=use_reentrant)):
        leaves = [t.requires_grad_() for t in tensors_of(name, dtype, device)]
        results = compute(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        # Not torch.autograd.grad: within it PyTorch refuses to compute again with use_reentrant.
        torch.autograd.backward(results, [incoming(i, r) for i, r in enumerate(results)])
        found.append((*(r.detach() for r in results), *(t.grad for t in leaves)))
    assert equal(*found)


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.property("inputs stay as they are")
@on_every_backend
def test_inputs_stay_as_they_are(backend, device, dtype, name):
    """Tensors, masks, offsets: their values and their version counters."""
    _, options = VARIANTS[name].of(**VARIANTS[name].large)
    others = {key: value.to(device) for key, value in options.items() if isinstance(value, torch.Tensor)}
    run, tensors = of_size(name, backend, device, **others)
    leaves = [t.requires_grad_() for t in tensors]
    watched = [*leaves, *others.values()]
    before = [(t.detach().clone(), t._version) for t in watched]
    results = run(*leaves)
    torch.autograd.grad(results, leaves, [incoming(i, r) for i, r in enumerate(results)], allow_unused=True)
    assert all(torch.equal(t, value) and t._version == version for t, (value, version) in zip(watched, before))


@pytest.mark.property("saved tensors are watched")
@on_every_backend
def test_saved_tensors_are_watched(backend, device, dtype, name):
    """Changing an input in place between forward and backward is an error; or it wasn't kept, and nothing changes."""
    run, tensors = of_size(name, backend, device, size="sizes")
    expected = gradients(run, tensors)[-len(tensors) :]
    refused = 0
    for i in range(len(tensors)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        given = [t.clone() for t in leaves]
        results = run(*given)
        with torch.no_grad():
            given[i].add_(1)
        ends = [(r, incoming(k, r)) for k, r in enumerate(results)]
        try:
            found = torch.autograd.grad([r for r, _ in ends], leaves, [g for _, g in ends])
        except RuntimeError as error:
            assert re.search("modified (by an )?inplace", str(error))
            refused += 1
        else:
            assert equal(found, expected), i
    assert refused >= 2 or backend == "reference"  # plain PyTorch keeps copies in float32


# Determinism and threads ---------------------------------------------------------------------------------------------

# Of the others the sums over positions are divided as the threads are: the same number of them gives the same bits.
INDEPENDENT = [name for name in VARIANTS if VARIANTS[name].operation in ("spatial_attention", "channel_attention")]
MANY = {"B": 2, "N": 2001, "Y": 40, "X": 50, "T": 77}


def many(name, backend, device, dtype):
    """Enough to be divided, where that doesn't take long."""
    sizes = VARIANTS[name].large | ({} if cases.is_slow(backend, device) else MANY)
    return function_of(name, mmk, device, sizes, backend=backend), tensors_of(name, dtype, device, **sizes)


@pytest.mark.threads
@pytest.mark.property("same bits twice")
@pytest.mark.parametrize(
    "backend, device, dtype, name",
    [
        p
        for p in parameters(dtypes=cases.DTYPES)
        if p.values[2] == torch.float32 or p.values[3] in MAIN or not cases.is_slow(*p.values[:2])
    ],
)
def test_same_bits_twice(backend, device, dtype, name):
    run, tensors = many(name, backend, device, dtype)
    first, second = (gradients(run, tensors) for _ in range(2))
    assert equal(first, second)


@pytest.mark.threads
@pytest.mark.property("same bits for any number of threads")
@pytest.mark.parametrize(
    "backend, device, dtype, name", [p for p in parameters(INDEPENDENT, cases.DTYPES) if p.values[0] == "cpu"]
)
def test_same_bits_for_any_number_of_threads(backend, device, dtype, name):
    run, tensors = many(name, backend, device, dtype)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(gradients(run, tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(found[0], other) for other in found[1:])


@pytest.mark.threads
@pytest.mark.property("many callers at once")
@of_every_main_variant
def test_many_callers_at_once(backend, device, dtype, name):
    """Python threads may call at the same time: nothing is shared between calls."""
    run, tensors = of_size(name, backend, device, size="sizes" if cases.is_slow(backend, device) else "large")
    expected = gradients(run, tensors)
    wrong = []

    def work():
        for _ in range(2 if cases.is_slow(backend, device) else 10):
            if not equal(gradients(run, tensors), expected):
                wrong.append(name)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
