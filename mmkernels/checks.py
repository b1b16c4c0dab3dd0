"""Argument checks shared by every operation: a message names the argument, what came and what was expected."""

import numbers

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


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


def shape(name, value, *expected):
    """`expected` holds a name and a size for each dimension; a size of None takes anything."""
    fits = value.dim() == len(expected) and all(
        size is None or actual == size for actual, (_, size) in zip(value.shape, expected))
    if not fits:
        names = ", ".join(n for n, _ in expected)
        sizes = ", ".join("any" if size is None else str(size) for _, size in expected)
        raise ValueError(f"{name} must have shape [{names}] = [{sizes}], got {list(value.shape)}")


def boolean_mask(name, value):
    is_tensor(name, value)
    if value.dtype != torch.bool:
        raise ValueError(f"{name} must be bool (True = takes part), got {value.dtype}")


def attention_mask(name, value, other_name, other, batch, heads, positions, tokens):
    """bool or floating point, [B, T] or broadcastable to [B, H, N, T]."""
    is_tensor(name, value)
    if value.dtype != torch.bool and value.dtype not in FLOATS:
        raise ValueError(f"{name} must be bool (True = attend) or floating point (added to the scores), got {value.dtype}")
    same_device(name, value, other_name, other)
    full = (batch, heads, positions, tokens)
    fits = tuple(value.shape) == (batch, tokens) or value.dim() <= 4 and all(
        size in (1, whole) for size, whole in zip(reversed(value.shape), reversed(full)))
    if not fits:
        raise ValueError(f"{name} must have shape [B, T] = [{batch}, {tokens}] or broadcast to [B, H, N, T] = {list(full)}, "
                         f"got {list(value.shape)}")


def choice(name, value, options):
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def number(name, value):
    """A real number, or a symbolic one while torch.compile traces."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def heads(name, value, channels):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1 or channels % value != 0:
        raise ValueError(f"{name} must be at least 1 and divide the {channels} channels of image, got {value}")


def bag_offsets(name, value, rows):
    """Ascending bounds of packed bags: int32 or int64 [B + 1], first 0, last = rows.

    The values are read in eager mode on the CPU only. A traced graph can't look at them, and a GPU would have to
    be waited for: there the kernels themselves confine every access to the rows that exist.
    """
    is_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name} must have shape [B + 1], got {list(value.shape)}")
    if value.device.type != "cpu" or is_traced(value):
        return
    first, last = int(value[0]), int(value[-1])
    if first != 0:
        raise ValueError(f"{name} must start with 0, got {first}")
    if last != rows:
        raise ValueError(f"{name} must end with the number of rows of image, {rows}, got {last}")
    if bool((value[1:] < value[:-1]).any()):
        bag = int((value[1:] < value[:-1]).nonzero()[0])
        raise ValueError(f"{name} must ascend, got {int(value[bag])} before {int(value[bag + 1])} at index {bag}")


def is_traced(tensor):
    """Whether a tensor has no values to look at, or they would become part of a graph."""
    return (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or isinstance(tensor, torch._subclasses.FakeTensor)
            or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None)


def image_rows(image, offsets):
    """``image`` is [B, N, D], or packed [rows, D] with valid offsets: (batch, channels, its rows as :func:`shape` expects them of a mask)."""
    if offsets is None:
        shape("image", image, ("B", None), ("N", None), ("D", None))
        return image.shape[0], image.shape[2], (("B", image.shape[0]), ("N", image.shape[1]))
    shape("image", image, ("rows", None), ("D", None))
    if isinstance(offsets, torch.Tensor):
        same_device("offsets", offsets, "image", image)
    bag_offsets("offsets", offsets, image.shape[0])
    return offsets.shape[0] - 1, image.shape[1], (("rows", image.shape[0]),)
