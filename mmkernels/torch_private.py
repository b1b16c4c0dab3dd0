"""PyTorch's private names that this package needs, and nothing else of it may use: they break first on a new torch.

Torch 2.10, 2.11, 2.12 and 2.13 have all of them; beside each is the file of PyTorch that uses it, too. When one goes,
this file says what it is for, and is the only one to change. Functions of C++ are taken under another name and not
wrapped: torch.compile knows them, and a call of a small operation has no time to spare.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils import _python_dispatch
from torch.utils.module_tracker import ModuleTracker

# Whether vmap, grad, jvp, ... of torch.func run. They don't know autograd rules of registered operations, so that there
# an autograd Function has to be called. (torch/autograd/function.py)
transforms_active = torch._C._are_functorch_transforms_active

# Whether a tensor is one of torch.func's wrappers, without values to look at. (torch/_functorch/eager_transforms.py)
is_transformed = torch._C._functorch.is_functorch_wrapped_tensor

# The rules of an operation for the dispatcher's autograd keys, written in Python, go on to what lies below with these.
# torch.library.register_autograd would do for reverse mode, but it drops the tangents of forward mode without a word
# where nothing requires a gradient. (torch/_library/autograd.py, torch/_library/custom_ops.py)
BelowAutograd = torch._C._AutoDispatchBelowAutograd
after_autograd = torch._C._after_autograd_keyset
after_inplace_or_view = torch._C._after_ADInplaceOrView_keyset

# The modes that see every operation that runs, the innermost last. (torch/utils/_python_dispatch.py)
dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack

# Whether tangents are followed at all; asked first, since it is cheap. And a context in which they are: PyTorch turns
# it off around an autograd Function's jvp. (torch/autograd/forward_ad.py)
forward_mode_enabled = torch._C._is_fwd_grad_enabled
forward_mode = forward_ad._set_fwd_grad_enabled

# Tensors of a graph that is being traced: torch.compile's and torch.export's (torch/_subclasses/).
TRACED = frozenset((FakeTensor, FunctionalTensor))


def apply(function, *arguments):
    """``function.apply`` of an eager call outside of torch.func's transforms. PyTorch's own asks ``inspect`` for the
    forward method's signature in every call, which takes longer than a small kernel (torch/autograd/function.py). What
    transforms left behind is no parameter, nor of another class."""
    living = [_unwrap_if_dead(a) if type(a) is torch.Tensor else a for a in arguments]
    return super(torch.autograd.Function, function).apply(*living)


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def in_dual_level():
    """Whether Python is inside of a level of forward mode (torch/autograd/forward_ad.py). A graph that torch.compile
    traces enters its level below Python, which then doesn't know of it."""
    return forward_ad._current_level >= 0


def traces_operations():
    """Whether make_fx writes down every operation that runs, with the values that Python looks at as constants
    (torch/fx/experimental/proxy_tensor.py)."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def symbolic(arguments):
    """Whether torch.fx.symbolic_trace runs, and gave one of these in place of a tensor: it has no sizes to compare.
    Export and compilers set the flag, too, and give tensors (torch/fx/_symbolic_trace.py)."""
    return _symbolic_trace._is_fx_tracing_flag and any(isinstance(a, torch.fx.Proxy) for a in arguments)


def constant_while_traced(function):
    """torch.compile calls the function instead of tracing it, and takes what it gives as a constant: as
    torch.compiler.assume_constant_result, which would import the compiler, and Triton with it
    (torch/_dynamo/decorators.py)."""
    function._dynamo_marked_constant = True
    return function


def has_hooks(module):
    """Whether calling a module runs more than its ``forward`` (torch/nn/modules/module.py, ``_call_impl``)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (nn.modules.module._has_any_global_hook() and _global_hooks_act())
    )


def _global_hooks_act():
    """Whether one of every module's hooks does more than to note which module runs: PyTorch's FlopCounterMode has
    such, and would count what runs only because it looks (torch/utils/module_tracker.py)."""
    module = nn.modules.module
    kinds = (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_pre_hooks,
        module._global_backward_hooks,
    )
    return any(getattr(hook, "__func__", None) not in _TRACKING for hooks in kinds for hook in hooks.values())


_TRACKING = (ModuleTracker._fw_pre_hook, ModuleTracker._fw_post_hook)


def known_true(condition):
    """Whether a comparison of sizes is true: of an exported graph's symbols only where it is for all that they may be.
    Asked for its truth it would limit them; elsewhere the graph is guarded by it
    (torch/fx/experimental/symbolic_shapes.py)."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # it imports SymPy

    return statically_known_true(condition)
