"""Additive attention: the public function, and the operation as PyTorch sees it."""

from .. import backends, checks
from ..reference.additive_attention import ACTIVATIONS, attend, wanted
from ..reference.dropout import draw_seed
from .common import accumulate_dtype, autocast, kept_rows
from .operation import Operation


def additive_attention(
    image,
    query,
    w_image,
    w_query,
    v,
    *,
    bias=None,
    w_gate=None,
    bias_gate=None,
    activation="tanh",
    mask=None,
    offsets=None,
    combine="pool",
    dropout_p=0.0,
    need_weights=False,
    need_scores=False,
    backend=None,
):
    """Attention with a small network for its scores: ``softmax_n(v . act(w_image image_n + w_query query + bias))``.

    With ``w_gate`` the hidden vector is multiplied by ``sigmoid(w_gate image_n + bias_gate)`` before ``v``. The ``N x
    A`` hidden matrix never exists: a panel of positions goes through product, activation, gate and ``v`` while it is in
    cache, its scores feed the softmax and the pooled sum, and the backward pass computes it again. (Training on the CPU
    keeps the products of the first rows, at most 16 MiB, or 80 MiB beside an image that wants no gradient: most bags'
    are not computed twice.)

    Args:
        image: ``[B, N, D]``, or with ``offsets`` packed bags ``[rows, D]``; float32, bfloat16, float16 or float64, any
        strides.
        query: ``[B, E]``, same dtype, or None: no query (attention-based pooling).
        w_image: ``[A, D]``, same dtype.
        w_query: ``[A, E]``, same dtype; None exactly where ``query`` is.
        v: ``[K, A]``, same dtype: K attention maps.
        bias: ``[A]``, same dtype, or None.
        w_gate: ``[A, D]``, same dtype, or None: no gate.
        bias_gate: ``[A]``, same dtype, or None; only with ``w_gate``.
        activation: ``"tanh"``, ``"relu"`` or ``"gelu"`` (the exact one, by erf).
        mask: bool ``[B, N]`` (``[rows]`` with ``offsets``), True = takes part.
        offsets: int32 or int64 ``[B + 1]``, or a list, ascending, first 0, last = rows: bag b is rows
            ``offsets[b]:offsets[b+1]``.
        combine: ``"pool"``: ``[B, K, D]``, the weighted sums. ``"multiply"`` (K = 1 only): like image, every position
        times its weight.
        dropout_p: the share, from 0 to 1, of elements that are set to 0 while the rest is scaled by ``1 / (1 - p)``: of
            the activated hidden vector, and, independently, of the gate where there is one. Always, as in SDPA: give 0
            for inference. Each call takes a seed from torch's default generator of the device, so that
            ``torch.manual_seed`` repeats it; which elements follows from the seed, the row (counted over samples and
            positions, or over packed rows) and the hidden unit: the same on every backend, and in the backward pass.
        need_weights: also return the weights, ``[B, K, N]`` (packed: ``[K, rows]``), float32 (float64 for float64),
        differentiable.
        need_scores: also return, last, the scores before the softmax, of the weights' shape and dtype, differentiable;
        -Inf at masked positions.
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        The result in image's dtype, or ``(result, weights)``, ``(result, scores)``, ``(result, weights, scores)``.
        Where nothing takes part (all masked, N = 0, an empty bag) result, weights and gradients are 0. What a masked
        position holds, NaN included, reaches nothing.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; the message names it.
        BackendError: the backend that was forced can't run.

    Source: Bahdanau et al. 2015 (arXiv:1409.0473); over image regions: SAN, Yang et al. 2016 (arXiv:1511.02274), and
    Anderson et al.
    2018 (arXiv:1707.07998); gated, over bags: Ilse et al. 2018 (arXiv:1802.04712).
    """
    tensors = image, query, w_image, w_query, v, bias, w_gate, bias_gate
    key = _passed.key((activation, combine, dropout_p, need_weights, need_scores), (*tensors, mask, offsets))
    if key in _passed:
        offsets = checks.bag_values(offsets, image)
    else:
        for name, tensor in zip(TENSORS, tensors):
            if tensor is not None or name not in OPTIONAL:
                checks.features(name, tensor)
        image, query, w_image, w_query, v, bias, w_gate, bias_gate = tensors = autocast(*tensors)
        need_weights = checks.flag("need_weights", need_weights)
        need_scores = checks.flag("need_scores", need_scores)
        dropout_p = checks.share("dropout_p", dropout_p)
        if offsets is not None:
            offsets = checks.bag_offsets(offsets, image)
        _check(dict(zip(TENSORS, tensors)), activation, mask, offsets, combine)
        _passed.add(key)
    run = backends.choose("additive_attention", image, backend)
    seed = draw_seed(image.device) if dropout_p else None
    inputs = image, query, w_image, w_query, v, bias, w_gate, bias_gate
    columns = kept_columns(w_image, w_gate)
    rows = kept_rows(run, image.numel() // image.shape[-1], columns, accumulate_dtype(image), *inputs)
    options = _INDICES[activation], combine == "pool", dropout_p, need_scores, rows
    result, weights, scores, _ = run(*inputs, mask, offsets, seed, *options)
    return wanted(result, (weights, need_weights), (scores, need_scores))


TENSORS = ("image", "query", "w_image", "w_query", "v", "bias", "w_gate", "bias_gate")
OPTIONAL = ("query", "w_query", "bias", "w_gate", "bias_gate")
_INDICES = {name: index for index, name in enumerate(ACTIVATIONS)}
_passed = checks.Passed()


def _check(given, activation, mask, offsets, combine):
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    checks.choice("combine", combine, ("pool", "multiply"))
    image, query, w_image, w_query, v, bias, w_gate, bias_gate = given.values()
    batch, channels, grid = checks.image_rows(image, offsets)
    if channels == 0:
        raise ValueError(f"image must have at least one channel (D), got shape {list(image.shape)}")
    for name, tensor in given.items():
        if tensor is not None and name != "image":
            checks.like(name, tensor, "image", image)
    checks.shape("w_image", w_image, ("A", None), ("D", channels))
    hidden = w_image.shape[0]
    if hidden == 0:
        raise ValueError(f"w_image must have at least one row (A), got shape {list(w_image.shape)}")
    if (query is None) != (w_query is None):
        present, absent = ("query", "w_query") if w_query is None else ("w_query", "query")
        raise ValueError(f"{absent} must be given with {present} (or both be None), got None")
    if query is not None:
        checks.shape("query", query, ("B", batch), ("E", None))
        checks.shape("w_query", w_query, ("A", hidden), ("E", query.shape[1]))
    checks.shape("v", v, ("K", None), ("A", hidden))
    if v.shape[0] == 0:
        raise ValueError(f"v must have at least one row (K), got shape {list(v.shape)}")
    if combine == "multiply" and v.shape[0] != 1:
        raise ValueError(f"v must have one row (K = 1) with combine='multiply', got shape {list(v.shape)}")
    if bias is not None:
        checks.shape("bias", bias, ("A", hidden))
    if w_gate is not None:
        checks.shape("w_gate", w_gate, ("A", hidden), ("D", channels))
    if bias_gate is not None:
        if w_gate is None:
            raise ValueError("w_gate must be given with bias_gate, got None")
        checks.shape("bias_gate", bias_gate, ("A", hidden))
    if mask is not None:
        checks.boolean_mask("mask", mask, "image", image, *grid)


# The operation. inputs: those of the public function; offsets int64; seed int64 [], where dropout_p isn't 0. options:
# activation, an index into ACTIVATIONS, pool, dropout_p, need_scores (without it the scores are empty), and kept_rows.
# extra: the first kept_rows rows' products with w_image and w_gate [kept_rows, A or 2 A]. The weights and it are kept.
# The query's part of the hidden vector is computed inside: as nodes of the graph apart from it a product and a bias
# that all samples share would cost a small call half of what all the rest costs.


def kept_columns(w_image, w_gate):
    """The products of a row: with w_image, and with w_gate."""
    return w_image.shape[0] * (1 if w_gate is None else 2)


def _reference(*arguments):
    *inputs, activation, pool, dropout_p, need_scores, _ = arguments
    result, weights, scores = attend(*inputs, list(ACTIVATIONS)[activation], pool, dropout_p)
    return result, weights, scores if need_scores else weights.new_empty(0)


def _fake(*arguments):
    image, _, w_image, _, v, _, w_gate, _, _, offsets, _, _, pool, _, need_scores, kept_rows = arguments
    batch = image.shape[0] if offsets is None else offsets.shape[0] - 1
    maps = v.shape[0]
    channels = image.shape[-1]
    shape = (batch, maps, image.shape[1]) if offsets is None else (maps, image.shape[0])
    accumulate = accumulate_dtype(image)
    return (
        image.new_empty((batch, maps, channels) if pool else image.shape),
        image.new_empty(shape, dtype=accumulate),
        image.new_empty(shape if need_scores else 0, dtype=accumulate),
        image.new_empty(kept_rows, kept_columns(w_image, w_gate), dtype=accumulate),
    )


OPERATION = Operation(
    "additive_attention",
    "(Tensor image, Tensor? query, Tensor w_image, Tensor? w_query, Tensor v, Tensor? bias, Tensor? w_gate, "
    "Tensor? bias_gate, Tensor? mask, Tensor? offsets, Tensor? seed, int activation, bool pool, float dropout_p, "
    "bool need_scores, SymInt kept_rows) -> (Tensor result, Tensor weights, Tensor scores, Tensor kept)",
    differentiable=TENSORS,
    shared=("w_image", "w_query", "v", "bias", "w_gate", "bias_gate", "offsets"),
    extras=("kept",),
    kept=("weights", "kept"),
    reference=_reference,
    fake=_fake,
    fake_grad=lambda name, tensor: tensor.new_empty(tensor.shape),
)
AdditiveAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("additive_attention", "cpu", "cuda")
backends.implement_lazily("triton", "additive_attention", "mmkernels.triton.additive_attention")
