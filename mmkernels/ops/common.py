"""What the operations' PyTorch side shares."""

import torch

from .. import checks
from ..reference.precision import autocast_is_on
from ..torch_private import transforms_active


def autocast(*tensors):
    """The floating-point tensors, in autocast's dtype where autocast is on (as SDPA does); None stays None."""
    device_type = next(t for t in tensors if t is not None).device.type
    if not autocast_is_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def cast(tensor, dtype):
    """In a dtype; None stays None. (A call of `to` that has nothing to do takes longer than this.)"""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def accumulate_dtype(tensor):
    """Sums and softmax run in float32, for float64 in float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_like_or_wide(name, tensor, other_name, other):
    """In another argument's dtype, or the one that sums run in, and on its device."""
    wide = accumulate_dtype(other)
    if tensor.dtype not in (other.dtype, wide):
        or_wide = "" if other.dtype == wide else f" or {wide}"
        raise ValueError(f"{name} must have {other_name}'s dtype {other.dtype}{or_wide}, got {tensor.dtype}")
    checks.same_device(name, tensor, other_name, other)


# Constants beside images that have no limit. An image that wants no gradient, as a bag of an encoder's features, leaves
# one product in three to be computed again, and memory for its own gradient.
KEPT_BYTES = 16 << 20
KEPT_BYTES_WITHOUT_IMAGE_GRAD = 80 << 20


def kept_rows(run, rows, columns, dtype, image, *inputs):
    """Of how many of the first rows the CPU's forward pass keeps what its backward pass would have to compute again
    (`columns` numbers of `dtype` each): as many as the constants above hold. None without a backward pass, in an
    exported graph, which may run anywhere, nor under torch.func's transforms, which fold samples."""
    if getattr(run, "backend", None) != "cpu" or torch.compiler.is_exporting() or transforms_active():
        return 0
    if not torch.is_grad_enabled() or not _require_gradients(image, *inputs):
        return 0
    limit = KEPT_BYTES if image.requires_grad else KEPT_BYTES_WITHOUT_IMAGE_GRAD
    return min(rows, limit // (columns * dtype.itemsize))


def overlap(a, b):
    """Whether two tensors' memory may overlap (by the range of bytes that each spans)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    span = lambda t: sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1
    a0, b0 = a.data_ptr(), b.data_ptr()
    return a0 < b0 + span(b) * b.element_size() and b0 < a0 + span(a) * a.element_size()


def same_memory(a, b):
    """Whether two tensors are the same elements at the same addresses."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def writes_itself(tensor):
    """Whether two elements of a tensor may share memory, as those of an expanded one do."""
    dims = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride()) if n > 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def move_batch(tensor, dim, size):
    """A vmapped tensor with its extra dimension in front; one that isn't vmapped is expanded there."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold(tensor):
    """[V, B, ...] -> [V * B, ...]"""
    return None if tensor is None else tensor.flatten(0, 1)


def needs_gradient(*tensors):
    """Whether a backward pass may come."""
    return torch.is_grad_enabled() and (transforms_active() or _require_gradients(*tensors))


def _require_gradients(*tensors):
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def empty_heads(like, channels):
    """An empty ``[B, H, N, channels]`` tensor; a view of ``[B, N, H * channels]`` where `like` is one."""
    batch, heads, positions, _ = like.shape
    if heads > 1 and positions > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(batch, positions, heads, channels).transpose(1, 2)
    return like.new_empty(batch, heads, positions, channels)


def softmax_shape(queries):
    """``[B, H, 2, N]``, of each query's softmax: its largest score, in the kernels' own unit, and one over the sum of
    the exponentials of what scores are less; 0 where nothing takes part."""
    return *queries.shape[:2], 2, queries.shape[2]


def unrounded_text_out(produced):
    """What backward takes means of: ``text_out``, or where that was rounded to 16 bits, what it was before."""
    text_out = produced.text_out
    return text_out if text_out.dtype == accumulate_dtype(text_out) else produced.unrounded


def empty_softmax(queries):
    return queries.new_empty(softmax_shape(queries), dtype=accumulate_dtype(queries))
