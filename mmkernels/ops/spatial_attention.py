"""Spatial attention: the public function, the autograd Function, and the rules of the registered operations."""

import torch

from .. import backends, checks, reference
from .common import accumulate_dtype, autocast, fold, move_batch, overlap, register_fake, same_memory, writes_itself


def spatial_attention(image, text, *, mask=None, offsets=None, scale=None, num_heads=1, combine="multiply",
                      rescale=False, layout="bnd", need_weights=False, out=None, backend=None):
    """Weighs every image position by how well it matches the text: ``softmax_n(scale * <image_n, text>)``, per head.

    One pass over the features; no score tensor the size of the image, no copy of a strided input. It is the fusion of
    the article's model (Dot -> softmax -> Multiply), with the softmax over positions.

    Args:
        image: features ``[B, N, D]``, or ``[B, D, Y, X]`` with ``layout="bdhw"`` (N = Y * X; contiguous and
            channels_last are both read as they lie). With ``offsets``: packed bags ``[rows, D]``.
            float32, bfloat16, float16 or float64, any strides.
        text: one vector a sample, ``[B, D]``, same dtype.
        mask: bool ``[B, N]`` (``[B, Y, X]`` for ``bdhw``, ``[rows]`` with ``offsets``), True = takes part.
        offsets: int32 or int64 ``[B + 1]``, or a list, ascending, first 0, last = rows: bag b is rows ``offsets[b]:offsets[b+1]``.
        scale: factor of the scores; default ``(D / num_heads) ** -0.5``.
        num_heads: H, divides D. The channels are split evenly, one softmax a head.
        combine: ``"multiply"``: like image, every position times its weight. ``"pool"``: ``[B, D]``, the weighted sum.
        rescale: multiplies the weights by the number of positions that take part: their mean is then 1.
        layout: ``"bnd"`` or ``"bdhw"``.
        need_weights: also return the weights, ``[B, H, N]`` (packed: ``[H, rows]``), float32 (float64 for float64),
            differentiable.
        out: a tensor to write the result into, inference only; may be ``image`` itself.
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        The result in image's dtype, or ``(result, weights)``. Where nothing takes part (all masked, N = 0, an empty
        bag) result, weights and gradients are 0. What a masked position holds, NaN included, reaches nothing.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; the message names it.
        BackendError: the backend that was forced can't run.

    Source: softmax attention of Bahdanau et al. 2015 (arXiv:1409.0473) over image positions, as in Xu et al. 2015
    (arXiv:1502.03044); split softmax: Milakov & Gimelshein 2018 (arXiv:1805.02867).
    """
    checks.features("image", image)
    checks.features("text", text)
    image, text = autocast(image, text)
    num_heads, rescale, need_weights = checks.integer("num_heads", num_heads), checks.flag("rescale", rescale), checks.flag("need_weights", need_weights)
    checks.choice("layout", layout, ("bnd", "bdhw"))
    if offsets is not None:
        if layout != "bnd":
            raise ValueError(f"layout must be 'bnd' with offsets (image is packed [rows, D]), got {layout!r}")
        offsets = checks.bag_offsets(offsets, image)
    _check(image, text, mask, offsets, scale, num_heads, combine, layout, out)
    if scale is None:
        scale = (image.shape[1 if image.dim() != 3 else 2] / num_heads) ** -0.5
    run = backends.choose("spatial_attention", image, backend)
    result, weights = run(image, text, mask, offsets, float(scale), num_heads, combine == "pool", rescale, out)
    return (result, weights) if need_weights else result


def _check(image, text, mask, offsets, scale, num_heads, combine, layout, out):
    checks.choice("combine", combine, ("multiply", "pool"))
    if scale is not None:
        checks.number("scale", scale)
    if layout == "bdhw":
        checks.shape("image", image, ("B", None), ("D", None), ("Y", None), ("X", None))
        batch, channels = image.shape[:2]
        grid = (("B", batch), ("Y", image.shape[2]), ("X", image.shape[3]))
    else:
        batch, channels, grid = checks.image_rows(image, offsets)
    if channels == 0:
        raise ValueError(f"image must have at least one channel (D), got shape {list(image.shape)}")
    checks.like("text", text, "image", image)
    checks.shape("text", text, ("B", batch), ("D", channels))
    checks.heads("num_heads", num_heads, ("image's D", channels))
    if mask is not None:
        checks.boolean_mask("mask", mask, "image", image, *grid)
    if out is not None:
        _check_out(out, image, text, mask, combine, batch, channels)


def _check_out(out, image, text, mask, combine, batch, channels):
    checks.is_tensor("out", out)
    checks.like("out", out, "image", image)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, out)):
        raise ValueError("out is for inference only, but image, text or out requires a gradient: "
                         "leave out away, or call under torch.no_grad()")
    expected = (batch, channels) if combine == "pool" else tuple(image.shape)
    if tuple(out.shape) != expected:
        raise ValueError(f"out must have the result's shape {list(expected)}, got {list(out.shape)}")
    if torch.compiler.is_compiling() or out.device.type == "meta":
        return                                    # no addresses to compare
    if writes_itself(out):
        raise ValueError(f"out must not overlap itself, got strides {out.stride()} for shape {list(out.shape)}")
    for name, tensor in (("image", image), ("text", text), ("mask", mask)):
        if tensor is not None and overlap(out, tensor) and not (
                name == "image" and combine == "multiply" and same_memory(out, image)):
            raise ValueError(f"out must not overlap {name} (it may be image itself when combine='multiply')")


# Backends. All take the same arguments: mask and offsets (int64) may be None, the layout is told by image's dimensions.

def _run_reference(image, text, mask, offsets, scale, num_heads, pool, rescale, out):
    result, weights = reference.spatial_attention(
        image, text, mask=mask, offsets=offsets, scale=scale, num_heads=num_heads, rescale=rescale,
        combine="pool" if pool else "multiply", layout="bdhw" if image.dim() == 4 else "bnd", need_weights=True)
    return (result if out is None else out.copy_(result)), weights


def _reference_backward(grad_result, grad_weights, image, text, weights, mask, offsets, scale, num_heads, pool,
                        rescale, need_image_grad, need_text_grad):
    """The gradients by autograd through the reference: differentiable again, so it also gives second derivatives."""
    outputs, pull = torch.func.vjp(
        lambda image, text: _run_reference(image, text, mask, offsets, scale, num_heads, pool, rescale, None), image, text)
    image_grad, text_grad = pull(tuple(torch.zeros_like(o) if g is None else g.to(o.dtype)
                                       for o, g in zip(outputs, (grad_result, grad_weights))))
    return (image_grad if need_image_grad else image.new_empty(0), text_grad if need_text_grad else text.new_empty(0))


_run_reference.backward = _reference_backward
backends.implement("reference", "spatial_attention", _run_reference)


# Autograd. The registered operations and the Functions share these; the Functions also serve torch.func's transforms, which
# don't know operations' autograd rules.

def _setup_context(ctx, inputs, output, backward):
    image, text, mask, offsets, *ctx.options = inputs
    ctx.backward = backward
    ctx.save_for_backward(image, text, output[1], mask, offsets)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_result, grad_weights):
    image, text, weights, mask, offsets = ctx.saved_tensors
    need_image_grad, need_text_grad = ctx.needs_input_grad[:2]
    if (grad_result is None and grad_weights is None) or not (need_image_grad or need_text_grad):
        return (None,) * 8
    image_grad, text_grad = ctx.backward(grad_result, grad_weights, image, text, weights, mask, offsets, *ctx.options,
                                         need_image_grad, need_text_grad)
    return (image_grad if need_image_grad else None, text_grad if need_text_grad else None) + (None,) * 6


def _setup_second(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _second(ctx, *grads):
    """Second derivatives run in plain PyTorch: `weights` is a function of image and text there, and gets no gradient."""
    grad_result, grad_weights, image, text, _, mask, offsets = ctx.saved_tensors
    given = [g is not None for g in (grad_result, grad_weights)]

    def first(image, text, *grads):
        grads = iter(grads)
        return _reference_backward(*(next(grads) if g else None for g in given), image, text, None, mask, offsets, *ctx.options)

    firsts, pull = torch.func.vjp(first, image, text, *(g for g in (grad_result, grad_weights) if g is not None))
    image_grad, text_grad, *rest = pull(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(firsts, grads)))
    rest = iter(rest)
    return (*(next(rest) if g else None for g in given), image_grad, text_grad) + (None,) * 9


class SpatialAttentionFunction(torch.autograd.Function):
    """``apply(image, text, mask, offsets, scale, num_heads, pool, rescale, backend) -> (result, weights)``.

    The Function behind :func:`mmkernels.spatial_attention`, for those who build on it; the arguments are not checked
    beyond what keeps the kernels safe. It keeps its inputs and the weights ``[B, H, N]``, nothing the size of image.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(image, text, mask=None, offsets=None, scale=1.0, num_heads=1, pool=False, rescale=False, backend=None):
        run = backends.choose("spatial_attention", image, backend)
        return getattr(run, "forward", run)(image, text, mask, offsets, scale, num_heads, pool, rescale, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *inputs, backend = inputs
        _setup_context(ctx, inputs, output, lambda *arguments: _BackwardFunction.apply(*arguments, backend))

    @staticmethod
    def backward(ctx, grad_result, grad_weights):
        return _backward(ctx, grad_result, grad_weights) + (None,)


class _BackwardFunction(torch.autograd.Function):
    """The first derivatives, with an autograd rule of their own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        *arguments, backend = arguments
        return backends.choose("spatial_attention", arguments[2], backend).backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_second(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, *grads):
        return _second(ctx, *grads) + (None,)


def register_operations(name, *names):
    """Teaches PyTorch the operations ``name``, ``name_out`` and ``name_backward``, and makes them the backends ``names``.

    They are defined elsewhere; here they get their fake, autograd and vmap rules.
    """
    namespace = torch.ops.mmkernels
    forward, backward = getattr(namespace, name).default, getattr(namespace, f"{name}_backward").default
    forward_out = getattr(namespace, f"{name}_out").default

    def fake(image, text, mask, offsets, scale, num_heads, pool, rescale):
        return (torch.empty_like(text, memory_format=torch.contiguous_format) if pool else torch.empty_like(image),
                _empty_weights(image, num_heads))

    def fake_out(image, text, mask, offsets, scale, num_heads, pool, rescale, out):
        return _empty_weights(image, num_heads)

    def fake_backward(grad_result, grad_weights, image, text, weights, mask, offsets, scale, num_heads, pool, rescale,
                      need_image_grad, need_text_grad):
        return (torch.empty_like(image) if need_image_grad else image.new_empty(0),
                torch.empty_like(text, memory_format=torch.contiguous_format) if need_text_grad else text.new_empty(0))

    for suffix, function in (("", fake), ("_out", fake_out), ("_backward", fake_backward)):
        register_fake(name + suffix, function)

    torch.library.register_autograd(
        f"mmkernels::{name}", _backward,
        setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output, backward))

    torch.library.register_autograd(f"mmkernels::{name}_backward", _second, setup_context=_setup_second)

    # vmap: dense samples are folded into the batch; packed bags become more bags.
    @torch.library.register_vmap(f"mmkernels::{name}")
    def _(info, in_dims, image, text, mask, offsets, *options):
        size = info.batch_size
        image, text, mask, offsets = (move_batch(t, d, size) for t, d in zip((image, text, mask, offsets), in_dims))
        packed = offsets is not None
        results, weights = forward(fold(image), fold(text), fold(mask), _fold_offsets(offsets, image), *options)
        weights = weights.unflatten(1, (size, -1)).movedim(1, 0) if packed else weights.unflatten(0, (size, -1))
        return (results.unflatten(0, (size, -1)), weights), (0, 0)

    @torch.library.register_vmap(f"mmkernels::{name}_backward")
    def _(info, in_dims, grad_result, grad_weights, image, text, weights, mask, offsets, *options):
        size = info.batch_size
        grad_result, grad_weights, image, text, weights, mask, offsets = (
            move_batch(t, d, size)
            for t, d in zip((grad_result, grad_weights, image, text, weights, mask, offsets), in_dims))
        if offsets is not None:                   # weights are [H, rows]: the new rows go behind the old
            weights = weights.movedim(0, 1).flatten(1)
            grad_weights = None if grad_weights is None else grad_weights.movedim(0, 1).flatten(1)
        else:
            weights, grad_weights = fold(weights), fold(grad_weights)
        grads = backward(fold(grad_result), grad_weights, fold(image), fold(text), weights.contiguous(), fold(mask),
                         _fold_offsets(offsets, image), *options)
        needs = options[-2:]
        return (tuple(g.unflatten(0, (size, -1)) if need else g for g, need in zip(grads, needs)),
                tuple(0 if need else None for need in needs))

    def operation(image, text, mask, offsets, scale, num_heads, pool, rescale, out):
        if out is None:
            return forward(image, text, mask, offsets, scale, num_heads, pool, rescale)
        return out, forward_out(image, text, mask, offsets, scale, num_heads, pool, rescale, out)

    def implement(backend):
        def run(*arguments):
            if torch._C._are_functorch_transforms_active():
                *inputs, out = arguments
                if out is None:
                    return SpatialAttentionFunction.apply(*inputs, backend)
            return operation(*arguments)

        run.forward, run.backward = operation, backward
        backends.implement(backend, "spatial_attention", run)

    for backend in names:
        implement(backend)


def _empty_weights(image, num_heads):
    if image.dim() == 2:
        shape = (num_heads, image.shape[0])
    elif image.dim() == 3:
        shape = (image.shape[0], num_heads, image.shape[1])
    else:
        shape = (image.shape[0], num_heads, image.shape[2] * image.shape[3])
    return image.new_empty(shape, dtype=accumulate_dtype(image))


def _fold_offsets(offsets, image):
    """[V, B + 1] of V packed images [V, rows, D] -> the bounds of all V * B bags in [V * rows, D]."""
    if offsets is None:
        return None
    rows = image.shape[1]
    starts = torch.arange(image.shape[0], device=offsets.device)[:, None] * rows
    return torch.cat([(offsets[:, :-1] + starts).flatten(), offsets.new_full((1,), image.shape[0] * rows)])


if backends.extension is not None:
    register_operations("spatial_attention", "cpu", "cuda")      # one operation: the dispatcher tells the devices apart
backends.implement_lazily("triton", "spatial_attention", "mmkernels.triton.spatial_attention")
