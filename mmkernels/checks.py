"""Argument checks shared by every operation: a message names the argument, what came and what was expected."""

import itertools
import numbers

import torch

from . import torch_private
from .reference.precision import autocast_is_on

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter}
_STRIDED = torch.strided
_PLAIN_OPTIONS = {type(None), bool, int, float, str}


class Passed:
    """The calls of an operation that passed its checks: another one like it isn't checked again.

    What may be left out are checks of types, shapes, dtypes and devices, which a call's key holds, not those of values.
    """

    LIMIT = 4096  # images of as many sizes

    def __init__(self):
        self._keys = set()

    def key(self, options, tensors):
        """None for a call that is always checked: traced, under autocast, with anything but plain tensors, None, and
        plain Python options."""
        if torch.compiler.is_compiling():
            return None
        types = tuple(map(type, options))  # True is 1 for a set
        if not _PLAIN_OPTIONS.issuperset(types):
            return None
        key = [options, types]
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                continue
            if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not _STRIDED:
                return None
            try:
                key += tensor.shape, tensor.dtype, tensor.device
            except RuntimeError:  # a nested tensor has no shape
                return None
        first = tensors[0]  # a device's name takes longer than to ask whether it is the CPU
        if first is None or autocast_is_on("cpu" if first.is_cpu else first.device.type):
            return None
        return tuple(key)

    def __contains__(self, key):
        return key is not None and key in self._keys

    def add(self, key):
        if key is None:
            return
        if len(self._keys) >= self.LIMIT:
            self._keys.clear()
        self._keys.add(key)


def is_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        nested = "nested, " if value.is_nested else ""
        raise ValueError(f"{name} must be a dense (strided) tensor, got {nested}layout {value.layout}")


def features(name, value):
    """A floating-point tensor of a dtype that the kernels know."""
    is_tensor(name, value)
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def like(name, value, other_name, other):
    """Same dtype and device as another argument."""
    if value.dtype != other.dtype:
        raise ValueError(f"{name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}")
    same_device(name, value, other_name, other)


def same_device(name, value, other_name, other):
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {value.device}")


def shape(name, value, *expected, hint=""):
    """`expected` holds a name and a size for each dimension; a size of None takes anything. `hint` ends the message."""
    if _fits(value.shape, expected):
        return
    names = ", ".join(n for n, _ in expected)
    sizes = ", ".join("any" if size is None else str(size) for _, size in expected)
    batch = ("B", None), ("B", 1)
    alone = (
        f": one sample without a batch is {name}[None]"
        if expected[0] in batch and _fits(value.shape, expected[1:])
        else ""
    )
    raise ValueError(f"{name} must have shape [{names}] = [{sizes}], got {list(value.shape)}{alone}{hint}")


def _fits(shape, expected):
    if len(shape) != len(expected):
        return False
    for actual, (_, size) in zip(shape, expected):
        if size is not None and actual != size:
            return False
    return True


def boolean_mask(name, value, other_name, other, *expected):
    """Of a shape as :func:`shape` takes it, on the device of another argument."""
    is_tensor(name, value)
    if value.dtype != torch.bool:
        raise ValueError(f"{name} must be bool (True = takes part), got {value.dtype}{_as_bool(name, value)}")
    same_device(name, value, other_name, other)
    shape(name, value, *expected)


def _as_bool(name, value):
    """Of a mask of zeros and ones, such as tokenizers give."""
    return "" if value.is_floating_point() or value.is_complex() else f": {name}.bool() makes zeros and ones a mask"


def attention_mask(name, value, other_name, other, batch, heads, positions, tokens):
    """bool or floating point, [B, T] or broadcastable to [B, H, N, T]: two dimensions are always [B, T]."""
    is_tensor(name, value)
    if value.dtype != torch.bool and value.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be bool (True = attend) or floating point (added to the scores), got {value.dtype}"
            f"{_as_bool(name, value)}"
        )
    same_device(name, value, other_name, other)
    full = (batch, heads, positions, tokens)
    if _broadcasts(value.shape, (batch, tokens) if value.dim() == 2 else full):
        return
    per_query = f": a mask per query is [1, 1, N, T], {name}[None, None]" if _broadcasts(value.shape, full) else ""
    raise ValueError(
        f"{name} must have shape [B, T] = [{batch}, {tokens}] or broadcast to [B, H, N, T] = {list(full)}, "
        f"got {list(value.shape)}{per_query}"
    )


def could_be_mask(value, full):
    """Whether something that doesn't fit in its place looks like an attention mask, [B, H, N, T] = `full` in whole."""
    return value.dtype == torch.bool or _broadcasts(value.shape, full) or _broadcasts(value.shape, (full[0], full[3]))


def _broadcasts(shape, full):
    return len(shape) <= len(full) and all(size in (1, whole) for size, whole in zip(reversed(shape), reversed(full)))


def choice(name, value, options):
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def flag(name, value):
    """A bool, also NumPy's, as Python's."""
    if isinstance(value, bool):
        return value
    if _of_numpy(value, "bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _of_numpy(value, *names):
    """Told by its name: NumPy is no dependency, and isn't imported to look."""
    return type(value).__module__ == "numpy" and type(value).__name__ in names


def number(name, value):
    """A real number, also NumPy's, as a float; a symbolic one while torch.compile traces."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value if isinstance(value, (torch.SymInt, torch.SymFloat)) else float(value)


def integer(name, value):
    """An int, also NumPy's, as Python's; a symbolic one while torch.compile traces."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def share(name, value):
    """A number from 0 to 1."""
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    return value


def dimension(name, value):
    """A size of at least 1."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def heads(name, value, *channels):
    """A number of heads, as Python's int; each of `channels`, a name and a size, is split evenly over them."""
    value = integer(name, value)
    for of, size in channels:
        if value < 1 or size % value != 0:
            raise ValueError(f"{name} must be at least 1 and divide {of} = {size}, got {value}")
    return value


def bag_offsets(value, image):
    """Ascending bounds of the bags packed in image [rows, D], first 0, last = rows, as int64 [B + 1] on image's device.

    A tensor (int32 or int64) must be there already; a list, a tuple or a NumPy array is brought there.
    The values are read in eager mode on the CPU only. A traced graph can't look at them, and a GPU would have to
    be waited for: there the kernels themselves confine every access to the rows that exist.
    """
    if isinstance(value, torch.Tensor):
        is_tensor("offsets", value)
        same_device("offsets", value, "image", image)
    else:
        value = _offsets_tensor(value)
    shape("image", image, ("rows", None), ("D", None))
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 or int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"offsets must have shape [B + 1], got {list(value.shape)}")
    return bag_values(value, image)


def bag_values(value, image):
    """The values of what :func:`bag_offsets` takes; its type, shape and device are known to be right, or it is None."""
    if value is None:
        return None
    if value.device.type == "cpu" and not is_traced(value):
        _bounds(value, image.shape[0])
    return value.to(image.device, torch.int64)


def is_traced(tensor):
    """Whether a tensor has no values to look at, or they would become part of a graph."""
    return (
        torch.compiler.is_compiling()
        or torch_private.is_transformed(tensor)
        or isinstance(tensor, torch_private.FakeTensor)
        or torch_private.traces_operations()
    )


def _offsets_tensor(value):
    """What isn't a tensor yet, as one."""
    if isinstance(value, (list, tuple)):
        return torch.tensor([integer(f"offsets[{i}]", bound) for i, bound in enumerate(value)], dtype=torch.int64)
    if _of_numpy(value, "ndarray"):
        return torch.as_tensor(value.copy())  # an array may be read-only, which a tensor is not
    raise TypeError(f"offsets must be a torch.Tensor or a list of ints, got {type(value).__name__}")


def _bounds(value, rows):
    bounds = value.tolist()
    if bounds[0] != 0:
        raise ValueError(f"offsets must start with 0, got {bounds[0]}")
    if bounds[-1] != rows:
        raise ValueError(f"offsets must end with the number of rows of image, {rows}, got {bounds[-1]}")
    if bounds != sorted(bounds):
        bag = next(i for i, (begin, end) in enumerate(itertools.pairwise(bounds)) if end < begin)
        raise ValueError(f"offsets must ascend, got {bounds[bag]} before {bounds[bag + 1]} at index {bag}")


def channel_text(image, text):
    """text [B, E] fits image [B, N, D] or [B, D]."""
    like("text", text, "image", image)
    hint = ": image [B, D] has no positions, one sample's [N, D] is image[None]" if image.dim() == 2 else ""
    shape("text", text, ("B", image.shape[0]), ("E", None), hint=hint)


def image_rows(image, offsets):
    """``image`` is [B, N, D], or packed [rows, D] with :func:`bag_offsets`: (batch, channels, the shape of a mask)."""
    if offsets is None:
        shape("image", image, ("B", None), ("N", None), ("D", None))
        return image.shape[0], image.shape[2], (("B", image.shape[0]), ("N", image.shape[1]))
    return offsets.shape[0] - 1, image.shape[1], (("rows", image.shape[0]),)
