"""How PyTorch sees an operation: autograd, fake, vmap and torch.func, the same for all of them.

An operation's kernels come as two registered functions, ``NAME`` and ``NAME_backward``:

    NAME(*inputs, *options) -> (*outputs, *extras)
    NAME_out(*inputs, *options, out) -> the second output; the first goes into `out`. (Only where the public function
    has `out`.)
    NAME_backward(*output_grads, *inputs, *kept, *options, *needs) -> (*input_grads)

``inputs`` are tensors or None, ``options`` plain values, ``extras`` what only the backward pass wants, ``kept`` what it
gets of outputs and extras, ``needs`` one bool for each differentiable input; a gradient that isn't needed comes as an
empty tensor. (A result that is alone comes bare, as PyTorch wants it; here everything gives tuples.) The plain PyTorch
reference serves as a backend of the same form, and gives the second derivatives and the tangents of all.
"""

import itertools

import torch
from torch.overrides import has_torch_function

from .. import backends, torch_private
from . import flops
from .common import fold, move_batch
from .registration import (
    in_tuple,
    may_carry_tangent,
    register_autograd,
    register_fake,
    register_out,
    register_vmap,
    tangent,
    tracked,
)
from .schema import Schema


class Implementation:
    """An operation on one backend. Called, it is followed by autograd and by torch.func's transforms.

    ``forward``, ``backward`` and ``into`` are the registered functions. Those have rules for autograd, too, but the way
    to them through the dispatcher costs a small call more than its kernel: eager calls ask here what the rules would,
    and go on below them.
    """

    def __init__(self, operation, backend, forward, backward, into):
        self.operation = operation
        self.backend = backend
        self.forward = forward
        self.backward = backward
        self.into = into

    def __call__(self, *arguments):
        if torch_private.transforms_active():  # they don't know registered autograd rules
            return self.operation.Function.apply(*arguments, self.backend)
        if torch.compiler.is_compiling() or has_torch_function(arguments):
            return self.forward(*arguments)
        if tracked(*arguments):
            return torch_private.apply(self.operation.Function, *arguments, self)
        with torch_private.BelowAutograd():
            return self.forward(*arguments)

    def compute(self, *arguments):
        """``forward`` within an autograd Function."""
        if torch_private.transforms_active() or torch.compiler.is_compiling():
            return self.forward(*arguments)
        with torch_private.BelowAutograd():
            return self.forward(*arguments)

    def differentiate(self, *arguments):
        """``backward``, followed by autograd where somebody asks for second derivatives."""
        if torch_private.transforms_active() or torch.compiler.is_compiling() or tracked(*arguments):
            return self.operation.BackwardFunction.apply(*arguments, self)
        with torch_private.BelowAutograd():
            return self.backward(*arguments)


class PlainImplementation(Implementation):
    """In plain PyTorch, which autograd and torch.func follow by themselves."""

    def __call__(self, *arguments):
        return self.forward(*arguments)

    def compute(self, *arguments):
        return self.forward(*arguments)

    def differentiate(self, *arguments):
        return self.operation.BackwardFunction.apply(*arguments, self)


class Operation:
    """One operation.

    Args:
        name: its name everywhere.
        schema: ``(*inputs, *options) -> (*outputs, *extras)``, as :class:`Schema` takes it.
        differentiable: names of the tensors that have gradients.
        shared: names of those without a batch dimension in front (weights).
        extras: names of the last results, which only the backward pass wants.
        kept: names of what it gets beside the arguments.
        keep: ``(inputs, outputs + extras) ->`` what that is, both named tuples. None: the results of those names.
        reference: ``(*inputs, *options) -> outputs``, a tuple, in plain PyTorch.
        fake: ``(*inputs, *options) -> outputs + extras``: tensors of the right shape, dtype and strides.
        fake_grad: ``(name, input) ->`` a tensor like its gradient.
    """

    def __init__(self, name, schema, *, differentiable, extras, kept, reference, fake, fake_grad, keep=None, shared=()):
        self.name = name
        self.schema = Schema(schema, differentiable, extras, kept)
        self.outputs = len(self.schema.outputs)
        self.extras = len(extras)
        self.kept = len(kept)
        self.keep = self._kept_by_name(kept) if keep is None else self._kept_by(keep)
        self.reference = reference
        self.fake = fake
        self.fake_grad = fake_grad
        inputs = self.schema.inputs
        self.names, self.inputs = inputs, len(inputs)
        self.differentiable = tuple(inputs.index(i) for i in differentiable)
        self.shared = {inputs.index(i) for i in shared}
        self.Function, self.BackwardFunction = _functions(self)
        reference_kernels = self._run_reference, self.reference_backward, self._reference_into
        backends.implement("reference", self.name, PlainImplementation(self, "reference", *reference_kernels))

    # Backends --------------------------------------------------------------------------------------------------------

    def register(self, name, *names):
        """Gives the registered functions ``name``, ``name_backward`` and ``name_out``, if there is one, their rules,
        and makes them the backends ``names``."""
        namespace = torch.ops.mmkernels
        forward = getattr(namespace, name).default
        backward = getattr(namespace, f"{name}_backward").default
        into = getattr(namespace, f"{name}_out").default if hasattr(namespace, f"{name}_out") else None
        for backend in names:
            run = Implementation(self, backend, in_tuple(forward), in_tuple(backward), into)
            backends.implement(backend, self.name, run)

        flops.register(forward, self.reference)
        flops.register(backward, self.reference_backward, before=self._reference_before_backward)
        register_fake(forward, self.fake)
        register_fake(backward, self._fake_backward)
        register_autograd(forward, lambda *arguments: self.Function.apply(*arguments, run))
        register_autograd(backward, lambda *arguments: self.BackwardFunction.apply(*arguments, run))
        register_vmap(forward, self._vmap(run.forward))
        register_vmap(backward, self._vmap(run.backward, self.outputs))
        if into is not None:
            flops.register(into, self._reference_into)
            register_fake(into, lambda *arguments: self.fake(*arguments[:-1])[1:])
            register_out(into)

    def choose(self, tensor, backend):
        """What runs on `tensor`: of the backend of that name (None: the fastest), or `backend` itself, where it is one
        that was chosen."""
        return backend if callable(backend) else backends.choose(self.name, tensor, backend)

    def _run_reference(self, *arguments):
        return (*self.reference(*arguments), *(None,) * self.extras)

    def _reference_into(self, *arguments):
        *arguments, out = arguments
        result, other = self._run_reference(*arguments)
        out.copy_(result)
        return other

    def reference_backward(self, *arguments):
        """First derivatives by autograd through the reference: differentiable again."""
        call = self.schema.backward_call(arguments)

        def run(tensors):
            return self.reference(*call.inputs._replace(**tensors), *call.options)

        outputs, pull = torch.func.vjp(run, self._wanted(call))
        upstream = (torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outputs, call.output_grads))
        (grads,) = pull(tuple(upstream))
        return self._gradients(call, grads)

    def _wanted(self, call):
        """The tensors whose gradients a backward call asks for, by their names."""
        named = ((name, getattr(call.inputs, name)) for name, need in call.needs._asdict().items() if need)
        return {name: tensor for name, tensor in named if tensor is not None}

    def _gradients(self, call, grads):
        """What a backward call returns, of gradients by their names."""
        return tuple(
            grads[name] if name in grads else call.inputs[0].new_empty(0) for name in self.schema.differentiable
        )

    def _reference_before_backward(self, *arguments):
        """What its backward pass begins with: the forward pass, of what it is called with."""
        call = self.schema.backward_call(arguments)
        return self.reference(*call.inputs, *call.options)

    # Autograd --------------------------------------------------------------------------------------------------------

    def _setup_context(self, ctx, inputs, output, backend):
        inputs, ctx.options = inputs[: self.inputs], inputs[self.inputs :]
        ctx.backend = backend
        ctx.save_for_backward(*inputs, *self.keep(inputs, output))
        # An implementation comes where no transform of torch.func is active. Saving for nobody takes as long as a small
        # kernel.
        if not isinstance(backend, Implementation) or may_carry_tangent(inputs):
            ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(*(t for t in output[self.outputs :] if t is not None))
        ctx.set_materialize_grads(False)

    def _kept_by_name(self, kept):
        places = [self.schema.returns.index(name) for name in kept]
        return lambda inputs, returned: [returned[i] for i in places]

    def _kept_by(self, keep):
        return lambda inputs, returned: keep(self.schema.Inputs(*inputs), self.schema.Returns(*returned))

    def _jvp(self, ctx):
        return *_tangents(self.reference, *ctx.saved_tensors, *ctx.options), *(None,) * self.extras

    def _backward(self, ctx, *grads):
        upstream = grads[: self.outputs]
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        present = [wanted[i] and saved[i] is not None for i in self.differentiable]
        found = [None] * (self.inputs + len(ctx.options) + 1)
        if True in present and (upstream[0] is not None or any(g is not None for g in upstream)):
            result = self._first(ctx.backend, *upstream, *saved, *ctx.options, *present)
            for i, need, grad in zip(self.differentiable, present, result):
                if need:
                    found[i] = grad
        return tuple(found)

    def _first(self, backend, *arguments):
        if isinstance(backend, Implementation):
            return backend.differentiate(*arguments)
        return self.BackwardFunction.apply(*arguments, backend)

    def _setup_second(self, ctx, inputs, output):
        call = self.schema.backward_call(inputs)
        ctx.save_for_backward(*call.output_grads, *call.inputs)
        ctx.save_for_forward(*call.output_grads, *call.inputs)
        ctx.options = (*call.options, *call.needs)
        ctx.set_materialize_grads(False)

    def _backward_jvp(self, ctx):
        return _tangents(self.reference_backward, *ctx.saved_tensors, *(None,) * self.kept, *ctx.options)

    def _second(self, ctx, *grads):
        """Second derivatives, in plain PyTorch: what is kept is a function of the inputs there, and gets no
        gradient."""
        call = self.schema.backward_call((*ctx.saved_tensors, *(None,) * self.kept, *ctx.options))

        def first(output_grads, inputs):
            changed = call._replace(
                output_grads=call.output_grads._replace(**output_grads), inputs=call.inputs._replace(**inputs)
            )
            return self.reference_backward(*itertools.chain(*changed))

        given = {name: grad for name, grad in call.output_grads._asdict().items() if grad is not None}
        tensors = {name: getattr(call.inputs, name) for name in self.schema.differentiable}
        firsts, pull = torch.func.vjp(first, given, {n: t for n, t in tensors.items() if t is not None})
        of_grads, of_inputs = pull(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(firsts, grads)))
        seconds = (*map(of_grads.get, self.schema.outputs), *map(of_inputs.get, self.schema.inputs))
        return *seconds, *(None,) * (self.kept + len(ctx.options))

    # Fake and vmap ---------------------------------------------------------------------------------------------------

    def _fake_backward(self, *arguments):
        call = self.schema.backward_call(arguments)
        grads = {name: self.fake_grad(name, tensor) for name, tensor in self._wanted(call).items()}
        return self._gradients(call, grads)

    def _vmap(self, function, before=0):
        """Folds the new dimension into the batch; where weights are vmapped, or want gradients, or bags are packed,
        or
        dropout counts rows, calls one after another."""
        shared = {before + i for i in self.shared}
        apart = {before + i for i, name in enumerate(self.names) if name in ("offsets", "seed")}

        def run(info, in_dims, *arguments):
            size = info.batch_size
            tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
            if not apart.isdisjoint(tensors) or (before and shared) or any(in_dims[i] is not None for i in shared):
                calls = [
                    function(
                        *(
                            a.select(in_dims[i], k) if i in tensors and in_dims[i] is not None else a
                            for i, a in enumerate(arguments)
                        )
                    )
                    for k in range(size)
                ]
                produced = [None if parts[0] is None else torch.stack(parts) for parts in zip(*calls)]
                return tuple(produced), tuple(None if p is None else 0 for p in produced)
            produced = function(
                *(
                    fold(move_batch(a, in_dims[i], size)) if i in tensors and i not in shared else a
                    for i, a in enumerate(arguments)
                )
            )
            whole = [p is None or p.dim() == 1 and p.numel() == 0 for p in produced]
            return (
                tuple(p if w else p.unflatten(0, (size, p.shape[0] // size)) for p, w in zip(produced, whole)),
                tuple(None if w else 0 for w in whole),
            )

        return run


def _tangents(function, *arguments):
    """The tangents of what a function in plain PyTorch gives for dual tensors."""
    with torch_private.forward_mode(True):  # around a Function's jvp it is off
        results = function(*arguments)
        return tuple(torch.zeros_like(r) if tangent(r) is None else tangent(r) for r in results)


def _functions(operation):
    """The autograd Functions: for those who build on them, for the registered operations, and for torch.func's
    transforms."""

    class BackwardFunction(torch.autograd.Function):
        @staticmethod
        def forward(*arguments):
            *arguments, backend = arguments
            return operation.choose(arguments[operation.outputs], backend).backward(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            operation._setup_second(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx, *grads):
            return *operation._second(ctx, *grads), None

        @staticmethod
        def jvp(ctx, *tangents):
            return operation._backward_jvp(ctx)

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return operation._vmap(BackwardFunction.apply, operation.outputs)(info, in_dims, *arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments):
            return operation.choose(arguments[0], arguments[-1]).compute(*arguments[:-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            operation._setup_context(ctx, inputs[:-1], output, inputs[-1])

        @staticmethod
        def backward(ctx, *grads):
            return operation._backward(ctx, *grads)

        @staticmethod
        def jvp(ctx, *tangents):
            return operation._jvp(ctx)

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return operation._vmap(Function.apply)(info, in_dims, *arguments)

    title = "".join(part.title() for part in operation.name.split("_"))
    Function = type(f"{title}Function", (Function,), {})  # nodes of the graph have the name that a class is made with
    BackwardFunction = type(f"{title}BackwardFunction", (BackwardFunction,), {})
    return Function, BackwardFunction
