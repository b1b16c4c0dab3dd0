"""The rules of PyTorch's dispatcher for registered operations: fake tensors, autograd in both modes, writing into
`out`.

torch.library.register_autograd would do for reverse mode, but it drops the tangents of forward mode without a word
where nothing requires a gradient. Private names of PyTorch that stand here are those that torch/_library/autograd.py
and custom_ops.py use (2.10 to 2.14).
"""

import functools

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("mmkernels", "FRAGMENT")

# A graph that torch.compile traces enters forward mode's level below Python, which then doesn't know of it.
TRACED = (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)


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

    torch.library.register_fake(operation.name(), checked)


def register_autograd(operation, apply):
    """Where autograd follows an argument ``apply(*arguments)`` runs, the apply of an autograd Function, else the kernel
    alone."""

    def run(keyset, *arguments):
        if not tracked(*arguments):
            return _below_autograd(operation, keyset, arguments)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{operation.name()} has no derivative under torch.func's transforms: there the public function, or its "
                f"autograd Function, has to be called"
            )
        return apply(*arguments)

    _implement(operation, "Autograd", run)


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
        result = operation.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)
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
    with torch._C._AutoDispatchBelowAutograd():
        return operation.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def tracked(*arguments):
    """Whether autograd follows one of the arguments, in reverse or in forward mode."""
    needs_gradient = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    return needs_gradient or carries_tangent(*arguments)


def carries_tangent(*arguments):
    """Whether one of the arguments is a dual tensor of forward mode."""
    if not torch._C._is_fwd_grad_enabled():
        return False
    kind = torch.Tensor if forward_ad._current_level >= 0 else TRACED
    return any(isinstance(a, kind) and tangent(a) is not None for a in arguments)


def tangent(tensor):
    """The tensor's tangent, or None. PyTorch has one level of duals; torch.func's transforms nest by wrapping
    tensors."""
    return forward_ad.unpack_dual(tensor, level=0).tangent
