"""Spatial attention: the public function, and the operation as PyTorch sees it."""

import torch

from .. import backends, checks, reference
from .common import accumulate_dtype, autocast, overlap, same_memory, writes_itself
from .operation import Operation
from .registration import carries_tangent


def spatial_attention(
    image,
    text,
    *,
    mask=None,
    offsets=None,
    scale=None,
    num_heads=1,
    combine="multiply",
    rescale=False,
    layout="bnd",
    need_weights=False,
    out=None,
    backend=None,
):
    """Weighs every image position by how well it matches the text: ``softmax_n(scale * <image_n, text>)``, per head.

    One pass over the features; no score tensor the size of the image, no copy of a strided input. It is the fusion of
    the article's model (Dot -> softmax -> Multiply), with the softmax over positions.

    Args:
        image: features ``[B, N, D]``, or ``[B, D, Y, X]`` with ``layout="bdhw"`` (N = Y * X; contiguous and
            channels_last are both read as they lie). With ``offsets``: packed bags ``[rows, D]``.
            float32, bfloat16, float16 or float64, any strides.
        text: one vector a sample, ``[B, D]``, same dtype.
        mask: bool ``[B, N]`` (``[B, Y, X]`` for ``bdhw``, ``[rows]`` with ``offsets``), True = takes part.
        offsets: int32 or int64 ``[B + 1]``, or a list, ascending, first 0, last = rows: bag b is rows
            ``offsets[b]:offsets[b+1]``.
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
    key = _passed.key((scale, num_heads, combine, rescale, layout, need_weights), (image, text, mask, offsets, out))
    if key in _passed:
        offsets = checks.bag_values(offsets, image)
    else:
        checks.features("image", image)
        checks.features("text", text)
        image, text = autocast(image, text)
        num_heads = checks.integer("num_heads", num_heads)
        rescale = checks.flag("rescale", rescale)
        need_weights = checks.flag("need_weights", need_weights)
        checks.choice("layout", layout, ("bnd", "bdhw"))
        if offsets is not None:
            if layout != "bnd":
                raise ValueError(f"layout must be 'bnd' with offsets (image is packed [rows, D]), got {layout!r}")
            offsets = checks.bag_offsets(offsets, image)
        _check(image, text, mask, offsets, scale, num_heads, combine, layout, out)
        _passed.add(key)
    if out is not None:
        _check_out_memory(out, image, text, mask, combine)
    if scale is None:
        scale = (image.shape[1 if image.dim() != 3 else 2] / num_heads) ** -0.5
    run = backends.choose("spatial_attention", image, backend)
    arguments = (image, text, mask, offsets, float(scale), num_heads, combine == "pool", rescale)
    result, weights = run(*arguments) if out is None else (out, run.into(*arguments, out))
    return (result, weights) if need_weights else result


_passed = checks.Passed()


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
        _check_out(out, image, combine, batch, channels)


def _check_out(out, image, combine, batch, channels):
    checks.is_tensor("out", out)
    checks.like("out", out, "image", image)
    expected = (batch, channels) if combine == "pool" else tuple(image.shape)
    if tuple(out.shape) != expected:
        raise ValueError(f"out must have the result's shape {list(expected)}, got {list(out.shape)}")


def _check_out_memory(out, image, text, mask, combine):
    if torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, out)):
        raise ValueError(
            "out is for inference only, but image, text or out requires a gradient: "
            "leave out away, or call under torch.no_grad()"
        )
    if torch.compiler.is_compiling() or out.device.type == "meta":
        return  # no addresses to compare
    if carries_tangent(image, text, out):
        raise ValueError(
            "out is for inference only, but image, text or out carries a tangent of forward mode: leave out away"
        )
    if out.is_neg():
        raise ValueError(
            "out must not be a negative view (what .imag of a conjugate is): what is written there comes back negated"
        )
    if writes_itself(out):
        raise ValueError(f"out must not overlap itself, got strides {out.stride()} for shape {list(out.shape)}")
    for name, tensor in (("image", image), ("text", text), ("mask", mask)):
        if (
            tensor is not None
            and overlap(out, tensor)
            and not (name == "image" and combine == "multiply" and same_memory(out, image))
        ):
            raise ValueError(f"out must not overlap {name} (it may be image itself when combine='multiply')")


# The operation. inputs: offsets int64; the layout is told by image's dimensions. options: scale, num_heads, pool,
# rescale. The weights are
# kept: of what the backward pass needs beside the inputs nothing has the size of image.


def _reference(image, text, mask, offsets, scale, num_heads, pool, rescale):
    return reference.spatial_attention(
        image,
        text,
        mask=mask,
        offsets=offsets,
        scale=scale,
        num_heads=num_heads,
        rescale=rescale,
        combine="pool" if pool else "multiply",
        layout="bdhw" if image.dim() == 4 else "bnd",
        need_weights=True,
    )


def _fake(image, text, mask, offsets, scale, num_heads, pool, rescale):
    if offsets is not None:
        shape = (num_heads, image.shape[0])
    elif image.dim() == 3:
        shape = (image.shape[0], num_heads, image.shape[1])
    else:
        shape = (image.shape[0], num_heads, image.shape[2] * image.shape[3])
    return _fake_grad("text", text) if pool else _fake_grad("image", image), image.new_empty(
        shape, dtype=accumulate_dtype(image)
    )


def _fake_grad(name, tensor):
    return torch.empty_like(tensor, memory_format=torch.preserve_format if name == "image" else torch.contiguous_format)


OPERATION = Operation(
    "spatial_attention",
    "(Tensor image, Tensor text, Tensor? mask, Tensor? offsets, float scale, int num_heads, bool pool, bool "
    "rescale) -> (Tensor result, Tensor weights)",
    differentiable=("image", "text"),
    extras=(),
    kept=("weights",),
    reference=_reference,
    fake=_fake,
    fake_grad=_fake_grad,
)
SpatialAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("spatial_attention", "cpu", "cuda")  # one operation: the dispatcher tells the devices apart
backends.implement_lazily("triton", "spatial_attention", "mmkernels.triton.spatial_attention")
