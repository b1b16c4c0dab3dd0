"""Bidirectional attention: the public function, and the operation as PyTorch sees it."""

from .. import backends, checks, reference
from .common import accumulate_dtype, autocast, empty_heads, empty_softmax, unrounded_text_out
from .operation import Operation


def bidirectional_attention(
    image_query, text_key, image_value, text_value, *, image_mask=None, text_mask=None, scale=None, backend=None
):
    """Image attends to text and text to image, from one score matrix ``S = scale * image_query text_key^T``, per head.

    ``image_out = softmax_T(S + text_mask) text_value`` and ``text_out = softmax_N(S^T + image_mask) image_value``.
    Every tile of scores is computed once and feeds both; the ``N x T`` matrix is never written.

    Args:
        image_query: ``[B, H, N, d]``, float32, bfloat16, float16 or float64, any strides (as in
            :func:`mmkernels.gated_cross_attention`).
        text_key: ``[B, H, T, d]``, same dtype.
        image_value: ``[B, H, N, dv]``, same dtype.
        text_value: ``[B, H, T, dv]``, same dtype.
        image_mask: bool ``[B, N]``, True = takes part: the positions that the text may attend to.
        text_mask: bool ``[B, T]``, True = takes part: the tokens that the image may attend to.
        scale: factor of the scores; default ``d ** -0.5``.
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        ``(image_out [B, H, N, dv], text_out [B, H, T, dv])`` in the inputs' dtype; 0 where there is nothing to attend
        to. What is masked out still attends itself, and gets its own row of the result; NaN or Inf that it holds counts
        as 0.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; the message names it.
        BackendError: the backend that was forced can't run.

    Source: the deep fusion of GLIP, Li et al. 2022 (arXiv:2112.03857), as in Grounding DINO, Liu et al. 2023
    (arXiv:2303.05499).
    """
    tensors = image_query, text_key, image_value, text_value
    key = _passed.key((scale,), (*tensors, image_mask, text_mask))
    if key not in _passed:
        for name, tensor in zip(("image_query", "text_key", "image_value", "text_value"), tensors):
            checks.features(name, tensor)
        image_query, text_key, image_value, text_value = autocast(*tensors)
        _check(image_query, text_key, image_value, text_value, image_mask, text_mask, scale)
        _passed.add(key)
    scale = float(image_query.shape[-1] ** -0.5 if scale is None else scale)
    run = backends.choose("bidirectional_attention", image_query, backend)
    image_out, text_out, *_ = run(image_query, text_key, image_value, text_value, image_mask, text_mask, scale)
    return image_out, text_out


_passed = checks.Passed()


def _check(image_query, text_key, image_value, text_value, image_mask, text_mask, scale):
    if scale is not None:
        checks.number("scale", scale)
    checks.shape("image_query", image_query, ("B", None), ("H", None), ("N", None), ("d", None))
    batch, heads, positions, width = image_query.shape
    if width == 0:
        raise ValueError(f"image_query must have at least one channel (d), got shape {list(image_query.shape)}")
    checks.like("text_key", text_key, "image_query", image_query)
    checks.shape("text_key", text_key, ("B", batch), ("H", heads), ("T", None), ("d", width))
    checks.like("image_value", image_value, "image_query", image_query)
    checks.shape("image_value", image_value, ("B", batch), ("H", heads), ("N", positions), ("dv", None))
    if image_value.shape[3] == 0:
        raise ValueError(f"image_value must have at least one channel (dv), got shape {list(image_value.shape)}")
    checks.like("text_value", text_value, "image_query", image_query)
    checks.shape(
        "text_value", text_value, ("B", batch), ("H", heads), ("T", text_key.shape[2]), ("dv", image_value.shape[3])
    )
    for name, mask, size in (
        ("image_mask", image_mask, ("N", positions)),
        ("text_mask", text_mask, ("T", text_key.shape[2])),
    ):
        if mask is not None:
            checks.boolean_mask(name, mask, "image_query", image_query, ("B", batch), size)


# The operation. option: scale; extras: image_softmax and text_softmax, what the weights are recomputed from, and
# `unrounded`: text_out in float32 where it has 16 bits.


def _reference(image_query, text_key, image_value, text_value, image_mask, text_mask, scale):
    return reference.bidirectional_attention(
        image_query, text_key, image_value, text_value, image_mask=image_mask, text_mask=text_mask, scale=scale
    )


def _fake(image_query, text_key, image_value, text_value, image_mask, text_mask, scale):
    channels = image_value.shape[3]
    accumulate = accumulate_dtype(text_key)
    return (
        empty_heads(image_query, channels),
        empty_heads(text_key, channels),
        empty_softmax(image_query),
        empty_softmax(text_key),
        text_key.new_empty(0 if text_key.dtype == accumulate else (*text_key.shape[:3], channels), dtype=accumulate),
    )


def _keep(inputs, produced):
    return produced.image_out, unrounded_text_out(produced), produced.image_softmax, produced.text_softmax


OPERATION = Operation(
    "bidirectional_attention",
    "(Tensor image_query, Tensor text_key, Tensor image_value, Tensor text_value, Tensor? image_mask, "
    "Tensor? text_mask, float scale) -> (Tensor image_out, Tensor text_out, Tensor image_softmax, Tensor "
    "text_softmax, Tensor unrounded)",
    differentiable=("image_query", "text_key", "image_value", "text_value"),
    extras=("image_softmax", "text_softmax", "unrounded"),
    kept=("image_out", "unrounded", "image_softmax", "text_softmax"),
    keep=_keep,
    reference=_reference,
    fake=_fake,
    fake_grad=lambda name, tensor: empty_heads(tensor, tensor.shape[3]),
)
BidirectionalAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("bidirectional_attention", "cpu", "cuda")
backends.implement_lazily("triton", "bidirectional_attention", "mmkernels.triton.bidirectional_attention")
