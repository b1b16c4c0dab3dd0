"""The rules of PyTorch's dispatcher for registered operations: fake tensors, autograd in both modes, writing into
`out`."""

import functools

import torch
from torch.autograd import forward_ad

from .. import torch_private

_library = torch.library.Library("mmkernels", "FRAGMENT")


def _alone(operation):
    """Whether an operation has one result, which the dispatcher gives and takes bare."""
    return len(operation._schema.returns) == 1


def in_tuple(operation):
    """An operation that gives a tuple, with one result, too."""
    return (lambda *arguments: (operation(*arguments),)) if _alone(operation) else operation


def _as_returned(operation, function):
    """A function that gives a tuple as what the operation returns."""
    return (lambda *arguments: function(*arguments)[0]) if _alone(operation) else function


def register_fake(operation, fake):
    """Tells PyTorch what an operation returns. Where only some of the arguments are meta tensors PyTorch calls the
    fake, not the
    kernels: without the check it would hand out memory that nobody wrote."""

    @functools.wraps(fake)
    def checked(*arguments):
        devices = {str(a.device) for a in arguments if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"{operation.name()}'s arguments must be on one device, got {' and '.join(sorted(devices))}"
            )
        return fake(*arguments)

    torch.library.register_fake(operation.name(), _as_returned(operation, checked))


def register_autograd(operation, apply):
    """Where autograd follows an argument ``apply(*arguments)`` runs, the apply of an autograd Function, else the kernel
    alone."""

    apply = _as_returned(operation, apply)

    def run(keyset, *arguments):
        if not tracked(*arguments):
            return _below_autograd(operation, keyset, arguments)
        if torch_private.transforms_active():
            raise RuntimeError(
                f"{operation.name()} has no derivative under torch.func's transforms: there the public function, or its "
                f"autograd Function, has to be called"
            )
        return apply(*arguments)

    _implement(operation, "Autograd", run)


def register_vmap(operation, vmap):
    """``vmap(info, in_dims, *arguments)`` gives results and their dimensions, both as tuples."""

    def run(info, in_dims, *arguments):
        results, dims = vmap(info, in_dims, *arguments)
        return (results[0], dims[0]) if _alone(operation) else (results, dims)

    torch.library.register_vmap(operation.name(), run)


def register_out(operation):
    """An operation whose last argument is written into: it has no derivative, and what was saved for another's is seen
    to have changed."""

    def autograd(keyset, *arguments):
        if tracked(*arguments):
            raise RuntimeError(
                f"{operation.name()} is for inference only, but one of its arguments requires a gradient or carries a tangent"
            )
        return _below_autograd(operation, keyset, arguments)

    def count(keyset, *arguments):
        result = operation.redispatch(keyset & torch_private.after_inplace_or_view, *arguments)
        torch.autograd.graph.increment_version(arguments[-1])
        return result

    def negative(*arguments):
        if arguments[-1].is_neg():
            raise RuntimeError(f"{operation.name()}: out must not be a negative view")
        return operation(*(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in arguments))

    _implement(operation, "Autograd", autograd)
    _implement(operation, "ADInplaceOrView", count)
    _library.impl(operation.name(), negative, "Negative")


def _implement(operation, key, function):
    _library.impl(operation.name(), function, key, with_keyset=True)


def _below_autograd(operation, keyset, arguments):
    with torch_private.BelowAutograd():
        return operation.redispatch(keyset & torch_private.after_autograd, *arguments)


def tracked(*arguments):
    """Whether autograd follows one of the arguments, in reverse or in forward mode."""
    if torch.is_grad_enabled():
        for a in arguments:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return carries_tangent(*arguments)


def carries_tangent(*arguments):
    """Whether one of the arguments is a dual tensor of forward mode."""
    if not torch_private.forward_mode_enabled() or not may_carry_tangent(arguments):
        return False
    return any(isinstance(a, torch.Tensor) and tangent(a) is not None for a in arguments)


def may_carry_tangent(arguments):
    """Whether there can be a dual tensor, outside of torch.func's transforms."""
    return torch_private.in_dual_level() or not torch_private.TRACED.isdisjoint(map(type, arguments))


def tangent(tensor):
    """The tensor's tangent, or None. PyTorch has one level of duals; torch.func's transforms nest by wrapping
    tensors."""
    return forward_ad.unpack_dual(tensor, level=0).tangent
