"""Every mistake in an argument has a message that names it, tells what came, and what was expected; the tables are in
tests/operations."""

import importlib
import inspect

import pytest
import torch
from operations.spatial_attention import IMAGE, TEXT
from support import module_mistakes as modules
from support.mistakes import of_public, wrong_tensors

import mmkernels as mmk
from mmkernels import backends, functional

OPERATIONS = {name: importlib.import_module(f"operations.{name}") for name in functional.__all__}
FORMS = [
    pytest.param(name, form, id=f"{name}-{kind}")
    for name, operation in OPERATIONS.items()
    for kind, form in operation.FORMS.items()
]
MISTAKES = [
    (name, kind, what, *mistake)
    for name, operation in OPERATIONS.items()
    for kind, what, mistake in of_public(getattr(mmk, name), operation)
]
on_every_operation = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.mark.parametrize("operation, form", FORMS)
def test_the_call_that_the_mistakes_differ_from_is_valid(operation, form):
    getattr(mmk, operation)(**form.arguments)


@pytest.mark.property("mistakes")
@pytest.mark.parametrize(
    "operation, kind, changes, exception, parts",
    [pytest.param(name, kind, *mistake, id=f"{name}-{kind}-{what}") for name, kind, what, *mistake in MISTAKES],
)
def test_message(operation, kind, changes, exception, parts):
    """Also right after the valid call: one that is like it wouldn't be checked again."""
    arguments = OPERATIONS[operation].FORMS[kind].arguments
    getattr(mmk, operation)(**arguments)
    with pytest.raises(exception) as caught:
        getattr(mmk, operation)(**arguments | changes)
    assert_message(caught, exception, parts)


@pytest.mark.property("mistakes")
@on_every_operation
def test_every_argument_has_its_mistakes(operation):
    mistaken = {argument for name, _, _, changes, *_ in MISTAKES if name == operation for argument in changes}
    assert mistaken == set(inspect.signature(getattr(mmk, operation)).parameters)


@pytest.mark.property("mistakes")
@on_every_operation
@pytest.mark.parametrize("backend", backends.names())
def test_mistakes_are_found_before_a_backend_is_chosen(operation, backend):
    """The same message whatever was forced, and whether or not it can run."""
    form = next(iter(OPERATIONS[operation].FORMS.values()))
    last = list(form.tensors)[-1]
    with pytest.raises(ValueError, match=f"^{last} must have shape"):
        getattr(mmk, operation)(**form.arguments | {last: form.tensors[last][None]}, backend=backend)


@on_every_operation
def test_positional_options_are_refused(operation):
    """What may be positional is told by api.md."""
    table = OPERATIONS[operation]
    form = next(iter(table.FORMS.values()))
    given = [
        form.arguments[name] for name in list(inspect.signature(getattr(mmk, operation)).parameters)[: table.POSITIONAL]
    ]
    getattr(mmk, operation)(*given)
    with pytest.raises(TypeError, match="positional"):
        getattr(mmk, operation)(*given, None)


@pytest.mark.property("a forced backend is never replaced")
@pytest.mark.parametrize(
    "operation, backend",
    [(o, b) for o in OPERATIONS for b in backends.names() if backends.why_not(b, o, "cpu", torch.float32)],
)
def test_forced_backend_that_cannot_run(operation, backend):
    with pytest.raises(mmk.BackendError) as caught:
        getattr(mmk, operation)(**next(iter(OPERATIONS[operation].FORMS.values())).arguments, backend=backend)
    assert isinstance(caught.value, RuntimeError)
    lines = str(caught.value).splitlines()
    assert all(part in lines[0] for part in (backend, operation, "cpu", "float32"))
    for name in backends.names():  # each with its reason
        line = next(line for line in lines[1:] if line.strip().startswith(f"{name}:"))
        reason = backends.why_not(name, operation, "cpu", torch.float32)
        assert line.strip() == f"{name}: {reason or 'can run'}".splitlines()[0]


@pytest.mark.property("a forced backend is never replaced")
@on_every_operation
def test_a_backend_that_refuses_is_never_replaced(operation, own_backends):
    """A forced backend raises, and does not run another one, even where others can run."""
    arguments = next(iter(OPERATIONS[operation].FORMS.values())).arguments
    backends.register("cpu", lambda device_type, dtype: "it is switched off by this test")
    with pytest.raises(mmk.BackendError, match="cpu: it is switched off by this test"):
        getattr(mmk, operation)(**arguments, backend="cpu")
    getattr(mmk, operation)(**arguments)


# The modules: their constructors, and what they are called with. Projections that are called tell the same as those
# that are read.


def assert_message(caught, exception, parts):
    assert type(caught.value) is exception
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize(
    "name, changes, exception, parts",
    [
        pytest.param(name, *mistake, id=f"{name}-{what}")
        for name in modules.MADE_OF
        for what, *mistake in modules.of_constructor(name)
    ],
)
def test_constructor_message(name, changes, exception, parts):
    getattr(mmk, name)(**modules.MADE_OF[name])
    with pytest.raises(exception) as caught:
        getattr(mmk, name)(**modules.MADE_OF[name] | changes)
    assert_message(caught, exception, parts)


@pytest.mark.parametrize("name", modules.MADE_OF)
def test_every_argument_of_a_constructor_has_its_mistakes(name):
    mistaken = {argument for _, changes, *_ in modules.of_constructor(name) for argument in changes}
    assert mistaken | modules.ELSEWHERE == set(inspect.signature(getattr(mmk, name)).parameters)


@pytest.mark.parametrize(
    "kind, called, changes, exception, parts",
    [
        pytest.param(kind, called, *mistake, id=f"{kind}-{what}-{'called' if called else 'read'}")
        for kind in modules.CALLS
        for called, mistakes in ((False, modules.of_call), (True, modules.of_call), (False, modules.of_projections))
        for what, *mistake in mistakes(kind)
    ],
)
def test_message_of_a_module(kind, called, changes, exception, parts):
    module = modules.module(kind)
    arguments = modules.CALLS[kind][2]
    if called:
        for child in module.children():
            child.register_forward_hook(lambda module, given, result: None)
    module(**arguments)
    with pytest.raises(exception) as caught:
        module(**arguments | changes)
    assert_message(caught, exception, parts)


def test_out_overlaps_an_input():
    memory = torch.randn(4, 6, 8)
    with pytest.raises(ValueError, match="out must not overlap image"):
        mmk.spatial_attention(memory[:2], TEXT, out=memory[1:3])
    with pytest.raises(ValueError, match="out must not overlap image"):
        mmk.spatial_attention(memory[:2], TEXT, combine="pool", out=memory[0, :2])
    with pytest.raises(ValueError, match="out must not overlap text"):
        mmk.spatial_attention(IMAGE, memory[0, :2], out=memory[:2])


def test_out_under_no_grad():
    """A parameter may be an input where no gradient is recorded."""
    image = IMAGE.clone().requires_grad_()
    out = torch.empty(2, 6, 8)
    with torch.no_grad():
        assert mmk.spatial_attention(image, TEXT, out=out) is out
    assert torch.equal(out, mmk.spatial_attention(IMAGE, TEXT))


# The registered operations don't trust their caller either: a RuntimeError, never a crash. (With any meta tensor among
# the arguments, PyTorch runs the operation's fake, which touches no memory.)


def kernels(of_backend=""):
    """(function, its valid call, the changes that it must refuse beyond wrong tensors) of every form."""
    for name, operation in OPERATIONS.items():
        for kind, (form, further) in operation.KERNELS.items():
            form = form.keeping_nothing() if of_backend and "kept_rows" in form.others else form
            for suffix, tensors in {"": {}, **further}.items():
                function = f"{name}{of_backend}{suffix}"
                wrong = operation.WRONG.get(kind, {})
                yield pytest.param(function, form.with_more(tensors), wrong, id=f"{function}-{kind}")


def call(function, arguments):
    """By name; all gradients are wanted."""
    registered = getattr(torch.ops.mmkernels, function).default
    needs = {
        a.name: True for a in registered._schema.arguments if a.name.startswith("need_") and a.name not in arguments
    }
    return registered(**arguments, **needs)


KERNELS = [*kernels()]
on_every_kernel = pytest.mark.parametrize("function, form, wrong", KERNELS)


def accepted(function, form, changes):
    """Which of {what: changes} raise no RuntimeError."""
    found = []
    for what, change in changes.items():
        try:
            call(function, form.arguments | change)
        except RuntimeError:
            continue
        found.append(what)
    return found


@pytest.mark.property("mistakes of a kernel's caller")
@on_every_kernel
def test_operation(extension, function, form, wrong):
    call(function, form.arguments)
    assert not accepted(function, form, wrong)


@pytest.mark.property("mistakes of a kernel's caller", backend="cuda-emulated")
@pytest.mark.skipif("cuda-emulated" not in backends.names(), reason="the CUDA emulator isn't there")
@pytest.mark.parametrize("function, form, wrong", [*kernels("_emulated")])
def test_operation_of_the_emulator(function, form, wrong):
    test_operation(None, function, form, wrong)


@pytest.mark.property("mistakes of a kernel's caller")
@on_every_kernel
def test_operation_with_wrong_tensors(extension, function, form, wrong):
    """Every tensor, one at a time, of another dtype, on another device, of other dimensions, and missing."""
    schema = getattr(torch.ops.mmkernels, function).default._schema
    optional = {a.name for a in schema.arguments if isinstance(a.type, torch._C.OptionalType)}
    for name in form.tensors:
        changes = {what: {name: tensor} for what, tensor in wrong_tensors(form, name) if (name, what) not in form.wider}
        assert not accepted(function, form, changes | ({} if name in optional else {"None": {name: None}})), name


@pytest.mark.property("mistakes of a kernel's caller")
@pytest.mark.parametrize("function, form, wrong", [k for k in KERNELS if k.values[0].endswith("_backward")])
def test_operation_backward_without_any_gradient(extension, function, form, wrong):
    """All may be None: the gradients are zeros then, or it is refused, but nothing is read."""
    gradients = {name: None for name in form.tensors if name.startswith("grad_")}
    if len(gradients) == 1:
        with pytest.raises(RuntimeError, match="grad_result must be given"):
            call(function, form.arguments | gradients)
    else:
        assert not any(t.any() for t in call(function, form.arguments | gradients))


@pytest.mark.property("meta and fake")
@on_every_kernel
def test_fake(extension, function, form, wrong):
    """On meta tensors the same shapes and dtypes come out, also where what may be missing is."""
    registered = getattr(torch.ops.mmkernels, function).default
    missing = {
        a.name: None
        for a in registered._schema.arguments
        if isinstance(a.type, torch._C.OptionalType) and a.name not in ("offsets", "grad_result")
    }
    if "w_gate" in missing and "kept" in form.tensors:
        missing["kept"] = form.tensors["kept"][:, : form.sizes["A"]]  # w_image's products alone
    for arguments in (form.arguments, form.arguments | missing):
        meta = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        found, expected = (
            r if isinstance(r, tuple) else (r,) for r in (call(function, meta), call(function, arguments))
        )
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
        assert all(t.device.type == "meta" for t in found)
