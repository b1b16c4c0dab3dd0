"""Gated cross-attention: the public function, and the operation as PyTorch sees it."""

import torch

from .. import backends, checks, reference
from ..reference.gated_cross_attention import attention_weights, four_dimensional, full_mask
from ..reference.precision import without_autocast
from .common import accumulate_dtype, autocast, empty_heads, empty_softmax, needs_gradient
from .operation import Operation


def gated_cross_attention(
    query, key, value, gate=None, *, attn_mask=None, scale=None, need_weights=False, backend=None
):
    """``gate * softmax(scale * query key^T + attn_mask) value``: attention whose result is multiplied, per head.

    The score matrix ``N x T`` is never written; keys and values of a head are prepared once for all queries, and the
    gate is multiplied where the result still lies in registers. Made for thousands of image positions and a short text.

    Args:
        query: ``[B, H, N, d]``, float32, bfloat16, float16 or float64. Any strides: a transposed view of ``[B, N, H *
        d]`` is
            read in place, and the result then lies like that, too.
        key: ``[B, H, T, d]``, same dtype.
        value: ``[B, H, T, dv]``, same dtype.
        gate: ``[B, H, N, dv]``, same dtype, or None: plain attention.
        attn_mask: bool (True = attend) or floating point (added to the scores), ``[B, T]``, or anything that broadcasts
        to
            ``[B, H, N, T]``; it is not expanded. Two dimensions are always ``[B, T]``: a mask per query is ``[1, 1, N,
            T]``.
        scale: factor of the scores; default ``d ** -0.5``.
        need_weights: also return the weights, ``[B, H, N, T]``, float32 (float64 for float64), differentiable. That
        matrix is
            what the kernels avoid: plain PyTorch computes it, beside the kernel.
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        ``[B, H, N, dv]`` in query's dtype, or ``(result, weights)``. A query that attends to no token gives 0 and has
        no gradient. What a token holds that no query attends to, or such a query, NaN included, reaches nothing.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; the message names it.
        BackendError: the backend that was forced can't run.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); the gate: pixel-word attention of LAVT, Yang et al. 2022
    (arXiv:2112.02244); online softmax and recomputation: Dao et al. 2022 (arXiv:2205.14135).
    """
    call = _passed.key((scale, need_weights), (query, key, value, gate, attn_mask))
    if call not in _passed:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            checks.features(name, tensor)
        if gate is not None:
            checks.is_tensor("gate", gate)
        query, key, value, gate = autocast(query, key, value, gate)
        need_weights = checks.flag("need_weights", need_weights)
        _check(query, key, value, gate, attn_mask, scale)
        _passed.add(call)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    tokens, pairs, bias = _masks(attn_mask, query, key)
    run = backends.choose("gated_cross_attention", query, backend)
    need_attended = gate is not None and needs_gradient(query, key, value, gate, bias)
    result, *_ = run(query, key, value, gate, tokens, pairs, bias, scale, need_attended)
    if not need_weights:
        return result
    return result, _weights(query, key, attn_mask, scale)


_passed = checks.Passed()


def _check(query, key, value, gate, attn_mask, scale):
    if scale is not None:
        checks.number("scale", scale)
    checks.shape("query", query, ("B", None), ("H", None), ("N", None), ("d", None))
    batch, heads, positions, width = query.shape
    if width == 0:
        raise ValueError(f"query must have at least one channel (d), got shape {list(query.shape)}")
    checks.like("key", key, "query", query)
    checks.shape("key", key, ("B", batch), ("H", heads), ("T", None), ("d", width))
    checks.like("value", value, "query", query)
    checks.shape("value", value, ("B", batch), ("H", heads), ("T", key.shape[2]), ("dv", None))
    if value.shape[3] == 0:
        raise ValueError(f"value must have at least one channel (dv), got shape {list(value.shape)}")
    if gate is not None:
        _check_gate(gate, query, key, value)
    if attn_mask is not None:
        checks.attention_mask("attn_mask", attn_mask, "query", query, batch, heads, positions, key.shape[2])


def _check_gate(gate, query, key, value):
    try:
        checks.features("gate", gate)
        checks.like("gate", gate, "query", query)
        checks.shape("gate", gate, *zip(("B", "H", "N", "dv"), (*query.shape[:3], value.shape[3])))
    except ValueError as error:
        # SDPA's fourth argument is the mask.
        if checks.could_be_mask(gate, (*query.shape[:3], key.shape[2])):
            raise ValueError(f"{error}: did you mean attn_mask=?") from None
        raise


def _masks(attn_mask, query, key):
    """attn_mask as the kernels take it, views all: (tokens [B, H, T], pairs [B, H, N, T], bias [B, H, N, T]), None if
    absent.

    `tokens` tells which of them any query attends to; where that says it all there are no `pairs`.
    """
    if attn_mask is None:
        return None, None, None
    if attn_mask.dtype != torch.bool:
        bias = four_dimensional(attn_mask.to(accumulate_dtype(query)))
        if bias.shape[3] == 1 and bias.requires_grad:
            # Added to all scores of a softmax it moves no weight: its gradient is 0, not what rounding leaves of it.
            bias = bias.detach().where(torch.ones_like(bias, dtype=torch.bool), bias)
        return None, None, full_mask(bias, query, key)
    small = four_dimensional(attn_mask)
    of_head = *query.shape[:2], key.shape[2]
    if small.shape[2] == 1:  # the same for all queries
        return small[:, :, 0].expand(of_head), None, None
    return small.any(2).expand(of_head), full_mask(attn_mask, query, key), None


@without_autocast
def _weights(query, key, attn_mask, scale):
    accumulate = accumulate_dtype(query)
    query, key, attn_mask = query.to(accumulate), key.to(accumulate), full_mask(attn_mask, query, key)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        query = query.where(attn_mask.any(3)[..., None], 0)
        key = key.where(attn_mask.any(2)[..., None], 0)
    return attention_weights(query, key, attn_mask, scale)


# The operation. options: scale, need_attended; extras: attended (the result before the gate, where it is needed), and
# softmax, what the weights are recomputed from.


def _reference(query, key, value, gate, tokens, pairs, bias, scale, need_attended):
    mask = bias if bias is not None else pairs if pairs is not None else None if tokens is None else tokens[:, :, None]
    return (reference.gated_cross_attention(query, key, value, gate, attn_mask=mask, scale=scale),)


def _fake(query, key, value, gate, tokens, pairs, bias, scale, need_attended):
    attended = empty_heads(query, value.shape[3]) if need_attended and gate is not None else query.new_empty(0)
    return empty_heads(query, value.shape[3]), attended, empty_softmax(query)


def _fake_grad(name, tensor):
    return tensor.new_empty(tensor.shape) if name == "bias" else empty_heads(tensor, tensor.shape[3])


OPERATION = Operation(
    "gated_cross_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? tokens, Tensor? pairs, Tensor? bias, "
    "float scale, bool need_attended) -> (Tensor result, Tensor attended, Tensor softmax)",
    differentiable=("query", "key", "value", "gate", "bias"),
    extras=("attended", "softmax"),
    kept=("attended", "softmax"),
    keep=lambda inputs, produced: (produced.result if inputs.gate is None else produced.attended, produced.softmax),
    reference=_reference,
    fake=_fake,
    fake_grad=_fake_grad,
)
GatedCrossAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("gated_cross_attention", "cpu", "cuda")  # one operation: the dispatcher tells the devices apart
backends.implement_lazily("triton", "gated_cross_attention", "mmkernels.triton.gated_cross_attention")
