"""How PyTorch sees an operation: autograd, fake, vmap and torch.func, the same for all of them.

An operation's kernels come as two registered functions, ``NAME`` and ``NAME_backward``:

    NAME(*inputs, *options) -> (*outputs, *extras)
    NAME_backward(*output_grads, *inputs, *kept, *options, *needs) -> (*input_grads)

``inputs`` are tensors or None, ``options`` plain values, ``extras`` what only the backward pass wants, ``kept`` what it gets of
outputs and extras, ``needs`` one bool for each differentiable input; a gradient that isn't needed comes as an empty tensor.
The plain PyTorch reference serves as a backend of the same form, and gives the second derivatives of all.
"""

import torch

from .. import backends
from .common import fold, move_batch, register_fake


class Operation:
    """One operation.

    Args:
        name: its name everywhere.
        inputs: names of the tensor arguments, in order.
        differentiable: those of them that have gradients.
        shared: those without a batch dimension in front (weights).
        outputs, extras: how many.
        kept: how many, and ``keep(inputs, outputs + extras)`` tells which.
        reference: ``(*inputs, *options) -> outputs``, a tuple, in plain PyTorch.
        fake: ``(*inputs, *options) -> outputs + extras``: tensors of the right shape, dtype and strides.
        fake_grad: ``(name, input) ->`` a tensor like its gradient.
    """

    def __init__(self, name, *, inputs, differentiable, outputs, extras, kept, keep, reference, fake, fake_grad, shared=()):
        self.name, self.outputs, self.extras, self.kept, self.keep = name, outputs, extras, kept, keep
        self.reference, self.fake, self.fake_grad = reference, fake, fake_grad
        self.names, self.inputs = inputs, len(inputs)
        self.differentiable = tuple(inputs.index(i) for i in differentiable)
        self.shared = {inputs.index(i) for i in shared}
        self.Function, self.BackwardFunction = _functions(self)
        self._implement("reference", self._run_reference, self.reference_backward, transformed=False)

    # Backends --------------------------------------------------------------------------------------------------------

    def register(self, name, *names, fake=None):
        """Gives the registered functions ``name`` and ``name_backward`` their rules, and makes them the backends ``names``.

        ``fake``: where their extras have other shapes than those of the others.
        """
        forward, backward = (getattr(torch.ops.mmkernels, n).default for n in (name, f"{name}_backward"))
        register_fake(name, fake or self.fake)
        register_fake(f"{name}_backward", self._fake_backward)
        torch.library.register_autograd(
            f"mmkernels::{name}", self._backward,
            setup_context=lambda ctx, inputs, output: self._setup_context(ctx, inputs, output, backward))
        torch.library.register_autograd(f"mmkernels::{name}_backward", self._second, setup_context=self._setup_second)
        torch.library.register_vmap(f"mmkernels::{name}", self._vmap(forward))
        torch.library.register_vmap(f"mmkernels::{name}_backward", self._vmap(backward, self.outputs))
        for backend in names:
            self._implement(backend, forward, backward)

    def _implement(self, backend, forward, backward, transformed=True):
        def run(*arguments):
            if transformed and torch._C._are_functorch_transforms_active():       # they don't know registered autograd rules
                return self.Function.apply(*arguments, backend)
            return forward(*arguments)

        run.backend, run.forward, run.backward = backend, forward, backward
        backends.implement(backend, self.name, run)

    def _run_reference(self, *arguments):
        return (*self.reference(*arguments), *(None,) * self.extras)

    def reference_backward(self, *arguments):
        """First derivatives by autograd through the reference: differentiable again."""
        upstream, inputs, _, options, needs = self._split(arguments)
        wanted = [i for i, need in zip(self.differentiable, needs) if need and inputs[i] is not None]

        def run(*tensors):
            given = dict(zip(wanted, tensors))
            return self.reference(*(given.get(i, value) for i, value in enumerate(inputs)), *options)

        outputs, pull = torch.func.vjp(run, *(inputs[i] for i in wanted))
        grads = dict(zip(wanted, pull(tuple(torch.zeros_like(o) if g is None else g.to(o.dtype)
                                            for o, g in zip(outputs, upstream)))))
        return tuple(grads[i] if i in grads else inputs[0].new_empty(0) for i in self.differentiable)

    # Autograd --------------------------------------------------------------------------------------------------------

    def _setup_context(self, ctx, inputs, output, backward):
        inputs, ctx.options = inputs[:self.inputs], inputs[self.inputs:]
        ctx.backward = backward
        ctx.save_for_backward(*inputs, *self.keep(inputs, output))
        ctx.set_materialize_grads(False)

    def _backward(self, ctx, *grads):
        upstream, saved = grads[:self.outputs], ctx.saved_tensors
        present = [saved[i] is not None and ctx.needs_input_grad[i] for i in self.differentiable]
        found = [None] * (self.inputs + len(ctx.options))
        if any(present) and any(g is not None for g in upstream):
            result = ctx.backward(*upstream, *saved, *ctx.options, *present)
            for i, need, grad in zip(self.differentiable, present, result):
                found[i] = grad if need else None
        return tuple(found)

    def _setup_second(self, ctx, inputs, output):
        upstream, given, kept, options, needs = self._split(inputs)
        ctx.save_for_backward(*upstream, *given)
        ctx.options = (*options, *needs)
        ctx.set_materialize_grads(False)

    def _second(self, ctx, *grads):
        """Second derivatives, in plain PyTorch: what is kept is a function of the inputs there, and gets no gradient."""
        saved = ctx.saved_tensors
        sources = [*range(self.outputs), *(self.outputs + i for i in self.differentiable)]
        sources = [i for i in sources if saved[i] is not None]

        def first(*tensors):
            given = dict(zip(sources, tensors))
            return self.reference_backward(*(given.get(i, value) for i, value in enumerate(saved)), *(None,) * self.kept, *ctx.options)

        firsts, pull = torch.func.vjp(first, *(saved[i] for i in sources))
        found = [None] * (len(saved) + self.kept + len(ctx.options))
        seconds = pull(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(firsts, grads)))
        for i, grad in zip(sources, seconds):
            found[i] = grad
        return tuple(found)

    def _split(self, arguments):
        """What the backward pass is called with, in its parts."""
        a, b, c, d = self.outputs, self.outputs + self.inputs, self.outputs + self.inputs + self.kept, len(arguments) - len(self.differentiable)
        return arguments[:a], arguments[a:b], arguments[b:c], arguments[c:d], arguments[d:]

    # Fake and vmap ---------------------------------------------------------------------------------------------------

    def _fake_backward(self, *arguments):
        _, inputs, _, _, needs = self._split(arguments)
        return tuple(self.fake_grad(self.names[i], inputs[i]) if need and inputs[i] is not None else inputs[0].new_empty(0)
                     for i, need in zip(self.differentiable, needs))

    def _vmap(self, function, before=0):
        """Folds the new dimension into the batch; where weights are vmapped, or want gradients, or bags are packed, calls one
        after another."""
        shared = {before + i for i in self.shared}
        packed = before + self.names.index("offsets") if "offsets" in self.names else None

        def run(info, in_dims, *arguments):
            size = info.batch_size
            tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
            if shared and (before or any(in_dims[i] is not None for i in shared) or packed in tensors):
                calls = [function(*(a.select(in_dims[i], k) if i in tensors and in_dims[i] is not None else a
                                    for i, a in enumerate(arguments))) for k in range(size)]
                return tuple(torch.stack(parts) for parts in zip(*calls)), (0,) * len(calls[0])
            produced = function(*(fold(move_batch(a, in_dims[i], size)) if i in tensors and i not in shared else a
                                  for i, a in enumerate(arguments)))
            empty = [p.dim() == 1 and p.numel() == 0 for p in produced]
            return (tuple(p if e else p.unflatten(0, (size, p.shape[0] // size)) for p, e in zip(produced, empty)),
                    tuple(None if e else 0 for e in empty))

        return run


def _functions(operation):
    """The autograd Functions: for those who build on them, and for torch.func's transforms."""

    class BackwardFunction(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            *arguments, backend = arguments
            return backends.choose(operation.name, arguments[operation.outputs], backend).backward(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            operation._setup_second(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx, *grads):
            return *operation._second(ctx, *grads), None

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            *arguments, backend = arguments
            run = backends.choose(operation.name, arguments[0], backend)
            return getattr(run, "forward", run)(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            *inputs, backend = inputs
            operation._setup_context(ctx, inputs, output, lambda *arguments: BackwardFunction.apply(*arguments, backend))

        @staticmethod
        def backward(ctx, *grads):
            return *operation._backward(ctx, *grads), None

    Function.__name__ = Function.__qualname__ = "".join(part.title() for part in operation.name.split("_")) + "Function"
    return Function, BackwardFunction
