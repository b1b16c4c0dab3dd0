"""Absorbed attention: the public function, and the operation as PyTorch sees it."""

from .. import backends, checks, reference
from .common import accumulate_dtype, autocast, cast, check_like_or_wide, empty_heads, softmax_shape, unrounded_text_out
from .operation import Operation


def absorbed_attention(
    image, key, value=None, *, key_bias=None, image_mask=None, text_mask=None, pool=True, backend=None
):
    """Attention of all heads over the same features: what would have projected the image stands on the text's side.

    With ``S_h = image key_h^T + key_bias_h``: ``image_out = sum_h softmax_T(S_h + text_mask) value_h`` and
    ``text_out_h = softmax_N(S_h^T + image_mask) image``. One pass over the image does both; neither its projections nor
    an ``N x H T`` matrix is ever written. Attention is linear around its softmax, so a layer with projections is this
    one exactly: the image's query projection and the scale go into ``key`` (its bias into ``key_bias``), the output
    projection into ``value``, and the image's value projection follows ``text_out``. It pays where
    ``T (D - d) < D d`` (d channels a head): :func:`mmkernels.absorb_pays` counts. Layers with the usual projections as
    parameters, which absorb them by themselves: :class:`mmkernels.BidirectionalAttention`,
    :class:`mmkernels.GatedCrossAttention`, :class:`mmkernels.AttentionPooling`.

    Args:
        image: ``[B, N, D]``, float32, bfloat16, float16 or float64, any strides (a channels-first map is a view).
        key: ``[B, H, T, D]``, same dtype; or float32 beside a bfloat16 or float16 image, as what was absorbed has more
            bits. T are text tokens, learned queries, or latents.
        value: ``[B, H, T, Dv]``, key's dtype, or None: no ``image_out``.
        key_bias: ``[B, H, T]``, image's dtype or float32, or None.
        image_mask: bool ``[B, N]``, True = takes part: the positions that the text may attend to.
        text_mask: bool ``[B, T]``, True = takes part: the tokens that the image may attend to.
        pool: whether ``text_out`` is wanted.
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        ``(image_out [B, N, Dv], text_out [B, H, T, D])`` in image's dtype; ``image_out`` is None without ``value``,
        ``text_out`` with ``pool=False``. 0 where there is nothing to attend to. What is masked out still attends
        itself, and gets its own row of the result; NaN or Inf that it holds counts as 0.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong, or neither result is wanted; the
            message names it.
        BackendError: the backend that was forced can't run.

    Source: absorbing: DeepSeek-V2 (arXiv:2405.04434), section 2.1; the layers: Li et al. 2022 (arXiv:2112.03857), Liu
    et al. 2023 (arXiv:2303.05499); pooling by learned queries: Lee et al. 2019 (arXiv:1810.00825).
    """
    tensors = image, key, value, key_bias, image_mask, text_mask
    call = _passed.key((pool,), tensors)
    if call not in _passed:
        checks.features("image", image)
        for name, tensor in (("key", key), ("value", value), ("key_bias", key_bias)):
            if tensor is not None or name == "key":
                checks.features(name, tensor)
        (image,) = autocast(image)  # the text's side may have more bits, and keeps them
        pool = checks.flag("pool", pool)
        _check(image, key, value, key_bias, image_mask, text_mask, pool)
        _passed.add(call)
    run = backends.choose("absorbed_attention", image, backend)
    bias = cast(key_bias, accumulate_dtype(image))
    image_out, text_out, *_ = run(image, key, bias, value, image_mask, text_mask, pool)
    return (None if value is None else image_out), (text_out if pool else None)


_passed = checks.Passed()


def _check(image, key, value, key_bias, image_mask, text_mask, pool):
    if value is None and not pool:
        raise ValueError("value must be given with pool=False, got None: no result is wanted")
    checks.shape("image", image, ("B", None), ("N", None), ("D", None))
    batch, positions, channels = image.shape
    if channels == 0:
        raise ValueError(f"image must have at least one channel (D), got shape {list(image.shape)}")
    check_like_or_wide("key", key, "image", image)
    checks.shape("key", key, ("B", batch), ("H", None), ("T", None), ("D", channels))
    heads, tokens = key.shape[1:3]
    if value is not None:
        check_like_or_wide("value", value, "image", image)
        if value.dtype != key.dtype:
            raise ValueError(f"value must have key's dtype {key.dtype}, got {value.dtype}")
        checks.shape("value", value, ("B", batch), ("H", heads), ("T", tokens), ("Dv", None))
        if value.shape[3] == 0:
            raise ValueError(f"value must have at least one channel (Dv), got shape {list(value.shape)}")
    if key_bias is not None:
        check_like_or_wide("key_bias", key_bias, "image", image)
        checks.shape("key_bias", key_bias, ("B", batch), ("H", heads), ("T", tokens))
    for name, mask, size in (("image_mask", image_mask, ("N", positions)), ("text_mask", text_mask, ("T", tokens))):
        if mask is not None:
            checks.boolean_mask(name, mask, "image", image, ("B", batch), size)


# The operation. input: key_bias in float32 (float64). option: pool. extras: image_softmax and text_softmax, what the
# weights are recomputed from, and `unrounded`: text_out in float32 where it has 16 bits. A result that isn't wanted is
# an empty tensor.


def _reference(image, key, key_bias, value, image_mask, text_mask, pool):
    results = reference.absorbed_attention(
        image, key, value, key_bias=key_bias, image_mask=image_mask, text_mask=text_mask, pool=pool
    )
    return tuple(image.new_empty(0) if result is None else result for result in results)


def _fake(image, key, key_bias, value, image_mask, text_mask, pool):
    batch, positions, channels = image.shape
    heads, tokens = key.shape[1:3]
    accumulate = accumulate_dtype(image)

    def empty(wanted, *shape, dtype=image.dtype):
        return image.new_empty(shape if wanted else 0, dtype=dtype)

    attend = value is not None
    return (
        empty(attend, batch, positions, value.shape[3] if attend else 0),
        empty(pool, batch, heads, tokens, channels),
        empty(attend, batch, heads, 2, positions, dtype=accumulate),
        empty(pool, *softmax_shape(key), dtype=accumulate),
        empty(pool and image.dtype != accumulate, batch, heads, tokens, channels, dtype=accumulate),
    )


def _fake_grad(name, tensor):
    return empty_heads(tensor, tensor.shape[3]) if tensor.dim() == 4 else tensor.new_empty(tensor.shape)


OPERATION = Operation(
    "absorbed_attention",
    "(Tensor image, Tensor key, Tensor? key_bias, Tensor? value, Tensor? image_mask, Tensor? text_mask, bool pool) -> "
    "(Tensor image_out, Tensor text_out, Tensor image_softmax, Tensor text_softmax, Tensor unrounded)",
    differentiable=("image", "key", "key_bias", "value"),
    extras=("image_softmax", "text_softmax", "unrounded"),
    kept=("unrounded", "image_softmax", "text_softmax"),
    keep=lambda inputs, produced: (unrounded_text_out(produced), produced.image_softmax, produced.text_softmax),
    reference=_reference,
    fake=_fake,
    fake_grad=_fake_grad,
)
AbsorbedAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("absorbed_attention", "cpu", "cuda")
backends.implement_lazily("triton", "absorbed_attention", "mmkernels.triton.absorbed_attention")
