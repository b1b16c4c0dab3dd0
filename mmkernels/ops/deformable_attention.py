"""Deformable attention: the public function, and the operation as PyTorch sees it."""

import torch

from .. import backends, checks, reference
from .common import accumulate_dtype, autocast, check_like_or_wide
from .operation import Operation


def deformable_attention(
    value, spatial_shapes, locations, scores, *, points=None, mask=None, softmax=True, backend=None
):
    """Each query's weighted sum of samples of the image, at K places that it chose, over several levels of resolution.

    ``result_qh = sum_k softmax_K(scores_qh)_k sample(value_h, location_qhk)``, each head alone. A sample is the
    bilinear mixture of the four positions around its location, zeros outside of its level: ``grid_sample`` with
    ``align_corners=False``. Softmax, sampling and the sum are one pass; the samples are never written.

    Args:
        value: ``[B, S, H, d]``, float32, bfloat16, float16 or float64, any strides (whose channels aren't neighbours
            is copied): the levels' positions one level after the other, each row by row.
        spatial_shapes: ``(Y, X)`` of each level, ``S = sum of Y X``; a sequence, or an int64 tensor ``[L, 2]`` (which
            on a GPU has to be waited for).
        locations: ``[B, Q, H, L, P, 2]``, (x, y) from 0 to 1 over each level's edges; or ``[B, Q, H, K, 2]`` with
            ``points``. In value's dtype, or float32 beside bfloat16 or float16: a coordinate needs its bits. What is
            outside, NaN or Inf samples nothing and gets no gradient.
        scores: ``[B, Q, H, L, P]``, or ``[B, Q, H, K]`` with ``points``; value's dtype, or float32.
        points: how many points each level has, where that differs: K in all, level by level.
        mask: bool ``[B, S]``, True = takes part; else the value counts as 0, whatever it holds.
        softmax: over all of a query's and head's points together. False: ``scores`` are the weights. (Of a weight that
            is Inf, Inf comes, or NaN where its sample is 0.)
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        ``[B, Q, H d]`` in value's dtype; 0 where all scores are -Inf.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; the message names it.
        BackendError: the backend that was forced can't run.

    Source: Zhu et al. 2021, Deformable DETR (arXiv:2010.04159), equation 3; different points a level: Lv et al. 2024,
    RT-DETRv2 (arXiv:2407.17140).
    """
    shapes = flat_shapes(spatial_shapes)
    points = None if points is None else _points(points)
    options = (softmax, len(shapes), *shapes, *(() if points is None else points))
    call = _passed.key(options, (value, locations, scores, mask))
    if call not in _passed:
        for name, tensor in (("value", value), ("locations", locations), ("scores", scores)):
            checks.features(name, tensor)
        value, scores = autocast(value, scores)  # locations keep their bits
        softmax = checks.flag("softmax", softmax)
        _check(value, shapes, locations, scores, points, mask)
        _passed.add(call)
    if points is None:
        points = (locations.shape[4],) * locations.shape[3]
        locations, scores = locations.flatten(3, 4), scores.flatten(3, 4)
    run = backends.choose("deformable_attention", value, backend)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return run(value, locations, scores, mask, shapes, points, softmax, deterministic)[0]


_passed = checks.Passed()


def flat_shapes(spatial_shapes):
    """As a flat tuple (Y, X, Y, X, ...) of ints."""
    if isinstance(spatial_shapes, torch.Tensor):
        checks.is_tensor("spatial_shapes", spatial_shapes)
        if spatial_shapes.dtype != torch.int64:
            raise ValueError(f"spatial_shapes must be a sequence of (Y, X) or int64, got {spatial_shapes.dtype}")
        checks.shape("spatial_shapes", spatial_shapes, ("L", None), ("2", 2))
        if spatial_shapes.device.type == "meta" or checks.is_traced(spatial_shapes):
            raise ValueError("spatial_shapes must be a sequence of (Y, X) where a graph is traced, got a tensor")
        return tuple(spatial_shapes.flatten().tolist())
    try:
        pairs = [tuple(pair) for pair in spatial_shapes]
    except TypeError:
        raise TypeError(f"spatial_shapes must be a sequence of (Y, X), got {_brief(spatial_shapes)}") from None
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"spatial_shapes[{i}] must be (Y, X), got {_brief(pair)}")
    return tuple(checks.integer(f"spatial_shapes[{i // 2}]", size) for i, size in enumerate(sum(pairs, ())))


def _points(points):
    try:
        return tuple(checks.integer(f"points[{i}]", count) for i, count in enumerate(points))
    except TypeError as error:
        if str(error).startswith("points["):
            raise
        raise TypeError(f"points must be a sequence of ints, one a level, got {_brief(points)}") from None


def _brief(value):
    """What came, of which nothing long is shown."""
    return type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)[:60]


def _check(value, shapes, locations, scores, points, mask):
    levels = list(zip(shapes[::2], shapes[1::2]))
    if not levels:
        raise ValueError("spatial_shapes must hold at least one level, got none")
    for i, (y, x) in enumerate(levels):
        if y < 1 or x < 1:
            raise ValueError(f"spatial_shapes[{i}] must be sizes of at least 1, got {(y, x)}")
    positions = sum(y * x for y, x in levels)
    hint = f": S is the sum of Y X over spatial_shapes {levels}"
    checks.shape("value", value, ("B", None), ("S", positions), ("H", None), ("d", None), hint=hint)
    batch, _, heads, channels = value.shape
    if channels == 0:
        raise ValueError(f"value must have at least one channel (d), got shape {list(value.shape)}")
    if points is None:
        of_points = ("L", len(levels)), ("P", None)
    else:
        if len(points) != len(levels):
            raise ValueError(f"points must have a count for each of {len(levels)} levels, got {list(points)}")
        if any(count < 0 for count in points):
            raise ValueError(f"points must not be negative, got {list(points)}")
        of_points = (("K", sum(points)),)
    for name, tensor in (("locations", locations), ("scores", scores)):
        check_like_or_wide(name, tensor, "value", value)
    checks.shape("locations", locations, ("B", batch), ("Q", None), ("H", heads), *of_points, ("2", 2))
    names = "BQHLP" if points is None else "BQHK"
    checks.shape("scores", scores, *zip(names, locations.shape[:-1]))
    if mask is not None:
        checks.boolean_mask("mask", mask, "value", value, ("B", batch), ("S", positions))


# The operation. options: spatial_shapes (Y, X of each level in turn), points of each, softmax, deterministic: whether
# backward gives the same bits every time, also where that is slower. extra: softmax_rows, of each query and head the
# largest score, in the kernels' own unit, and one over the sum of exponentials; empty without softmax.


def _reference(value, locations, scores, mask, spatial_shapes, points, softmax, deterministic):
    shapes = tuple(zip(spatial_shapes[::2], spatial_shapes[1::2]))
    result = reference.deformable_attention(value, shapes, locations, scores, points=points, mask=mask, softmax=softmax)
    return (result,)


def _fake(value, locations, scores, mask, spatial_shapes, points, softmax, deterministic):
    batch, queries, heads = scores.shape[:3]
    rows = (batch, queries, heads, 2) if softmax else 0
    return (
        value.new_empty(batch, queries, heads * value.shape[3]),
        value.new_empty(rows, dtype=accumulate_dtype(value)),
    )


def _fake_grad(name, tensor):
    return tensor.new_empty(tensor.shape)


OPERATION = Operation(
    "deformable_attention",
    "(Tensor value, Tensor locations, Tensor scores, Tensor? mask, int[] spatial_shapes, int[] points, bool softmax, "
    "bool deterministic) -> (Tensor result, Tensor softmax_rows)",
    differentiable=("value", "locations", "scores"),
    extras=("softmax_rows",),
    kept=("softmax_rows",),
    reference=_reference,
    fake=_fake,
    fake_grad=_fake_grad,
)
DeformableAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("deformable_attention", "cpu", "cuda")
backends.implement_lazily("triton", "deformable_attention", "mmkernels.triton.deformable_attention")
