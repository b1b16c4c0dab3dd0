"""What the modules share: checks of what projections give, whether a kernel may read their weights, heads."""

import types

import torch
from torch import nn

from .. import backends, checks
from ..reference.precision import autocast_is_on
from ..torch_private import FakeTensor, has_hooks


def check_features(name, tensor, *shape):
    checks.features(name, tensor)
    checks.shape(name, tensor, *shape)


def check_image(image, channels, offsets, layout="bnd"):
    """All channels must be there: a rank's part of them would be taken for all heads."""
    if layout == "bdhw":
        check_features("image", image, ("B", None), ("D", channels), ("Y", None), ("X", None))
    elif offsets is None:
        check_features("image", image, ("B", None), ("N", None), ("D", channels))
    else:
        check_features("image", image, ("rows", None), ("D", channels))


def check_channels(name, tensor, channels, why=""):
    """A projection that is called may be anything; what it gives must not broadcast."""
    if tensor.shape[-1] != channels:
        raise ValueError(f"{name} must give {channels} channels{why and ' ' + why}, got {tensor.shape[-1]}")


def check_absorb(absorb):
    """None, True or False; a module's may be set, later, to anything."""
    try:
        return None if absorb is None else checks.flag("absorb", absorb)
    except TypeError:
        raise TypeError(f"absorb must be None, True or False, got {type(absorb).__name__} {absorb!r}") from None


PLAIN_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)


def may_be_read(operation, backend, **projections):
    """Whether a kernel may read the projections' weights. If not they must be called, which a forced backend can't."""
    for name, projection in projections.items():
        if projection is None or is_plain_linear(projection):
            continue
        if backend not in (None, "reference"):
            raise backends.BackendError(
                f"backend {backend!r} can't run {operation} where {name} isn't a plain nn.Linear without hooks "
                f"(it is {type(projection).__name__}): "
                "it has to be called, and plain PyTorch does the rest, with backend=None or 'reference'"
            )
        return False
    return True


def is_plain(module, kind):
    """Of this very class, and a call runs nothing but the class's forward."""
    if type(module) is not kind:  # None, too
        return False
    own = "forward" not in module.__dict__ or given(module, "forward") is None
    return own and not has_hooks(module)


def given(module, method):
    """What this instance was given in place of a method of its class, or None. Who took his wrapper away again may have
    left the class's own, as accelerate does."""
    value = module.__dict__.get(method)
    its_own = isinstance(value, types.MethodType) and value.__self__ is module
    if its_own and value.__func__ is getattr(type(module), method):
        return None
    return value


def is_plain_linear(module, kind=nn.Linear):
    """Nothing but a weight and a bias: nobody notices whether it is called or its weight is read."""
    return (
        is_plain(module, kind)
        and type(module._parameters.get("weight")) in PLAIN_TENSORS
        and "bias" in module._parameters
        and (module._parameters["bias"] is None or type(module._parameters["bias"]) in PLAIN_TENSORS)
    )


def check_input(name, tensor, **projections):
    """An argument fits the projections that it is given to: PyTorch's errors name neither. One that isn't plain may
    take anything."""
    for projection_name, projection in projections.items():
        if not is_plain_linear(projection):
            continue
        weight = projection.weight
        if meet(tensor, weight) and tensor.shape[-1] == weight.shape[1]:
            continue
        checks.same_device(name, tensor, f"{projection_name}.weight", weight)
        if tensor.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name} must have {weight.shape[1]} channels for {projection_name}, got shape {list(tensor.shape)}"
            )
        checks.like(name, tensor, f"{projection_name}.weight", weight)


def reaching(tensor, cancelled):
    """`tensor`, which also gives a parameter that cancels its gradient, 0: data-parallel training waits for one of all
    parameters."""
    return tensor if tensor is None or cancelled is None else tensor + 0 * cancelled


def without_masked(features, mask):
    """``[B, N, C]``, where what is masked out, of NaN or Inf, counts as 0: the gradient of a weight that it meets would
    be 0 times that, NaN."""
    return features if mask is None else features.where(mask[:, :, None], features.nan_to_num(0, 0, 0))


def meet(tensor, other):
    """Whether both are on one device and of one dtype, or autocast brings them to one."""
    return tensor.device == other.device and (tensor.dtype == other.dtype or autocast_is_on(tensor.device.type))


def project_heads(module, projection_name, name, tensor, width):
    """[B, N, C], an argument, projected: a view [B, H, N, width]"""
    projection = getattr(module, projection_name)
    check_input(name, tensor, **{projection_name: projection})
    return split_heads(projection_name, projection(tensor), width)


def split_heads(name, tensor, width):
    """[B, N, H * width] -> a view [B, H, N, width]"""
    if tensor.shape[-1] % width:
        raise ValueError(f"{name} must give whole heads of {width} channels, got {tensor.shape[-1]}")
    return tensor.unflatten(-1, (tensor.shape[-1] // width, width)).transpose(1, 2)


def join_heads(tensor):
    """[B, H, N, C] -> [B, N, H * C], a view of what the kernels give"""
    return tensor.transpose(1, 2).flatten(2)
