"""Additive attention, as it is defined."""

import torch
from torch.nn.functional import gelu

from .precision import without_autocast

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": gelu}


@without_autocast
def additive_attention(image, query, w_image, w_query, v, *, bias=None, w_gate=None, bias_gate=None, activation="tanh",
                       mask=None, offsets=None, combine="pool", need_weights=False):
    """See :func:`mmkernels.additive_attention`. Runs in float32 (float64 for float64) inside."""
    accumulate = torch.float64 if image.dtype == torch.float64 else torch.float32
    query, w_query, bias, bias_gate = (None if t is None else t.to(accumulate) for t in (query, w_query, bias, bias_gate))
    shift = bias if query is None else query @ w_query.T if bias is None else query @ w_query.T + bias
    if shift is not None:
        shift = shift.expand(image.shape[0] if offsets is None else offsets.shape[0] - 1, -1)
    result, weights = attend(image, shift, w_image, v, w_gate, bias_gate, mask, offsets, activation, combine == "pool")
    return (result, weights) if need_weights else result


@without_autocast
def attend(image, shift, w_image, v, w_gate, shift_gate, mask, offsets, activation, pool):
    """(result, weights), where ``shift`` ``[B, A]`` holds the query's part of the hidden vector and the bias, or is None."""
    if offsets is not None:
        return _packed(image, shift, w_image, v, w_gate, shift_gate, mask, offsets, activation, pool)
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    x, w_image, v, w_gate = (None if t is None else t.to(accumulate) for t in (image, w_image, v, w_gate))
    part = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device) if mask is None else mask
    x = x.where(part[..., None], 0)               # what is masked out may hold NaN: replaced before any arithmetic can spread it

    hidden = ACTIVATIONS[activation](x @ w_image.T if shift is None else x @ w_image.T + shift[:, None])
    if w_gate is not None:
        gate = x @ w_gate.T
        hidden = hidden * torch.sigmoid(gate if shift_gate is None else gate + shift_gate)
    result, weights = combine_positions(x, hidden @ v.T, mask, None, pool)
    return result.to(dtype), weights


@without_autocast
def combine_positions(image, scores, mask, offsets, pool):
    """(result, weights) of scores ``[B, N, K]``, packed ``[rows, K]``; where it is masked, image is finite."""
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    combine = _combine if offsets is None else _combine_packed
    part = torch.ones(image.shape[:-1], dtype=torch.bool, device=image.device) if mask is None else mask
    result, weights = combine(image.to(accumulate), scores.to(accumulate), part, offsets, pool)
    return result.to(dtype), weights


def _combine(x, scores, part, offsets, pool):
    scores = scores.transpose(1, 2)               # [B, K, N]
    # A sample without any position keeps finite scores, so that its weights and gradients become 0, not NaN.
    some = part.any(1)[:, None, None]
    weights = scores.masked_fill(~part[:, None] & some, float("-inf")).softmax(-1).masked_fill(~part[:, None], 0)
    return (weights @ x if pool else weights.transpose(1, 2) * x), weights


def bag_of_rows(offsets, rows):
    """The bag that each row is in, int64 ``[rows]``."""
    return torch.searchsorted(offsets[1:], torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)


def _combine_packed(x, scores, part, offsets, pool):
    """All bags at once."""
    bags, maps = offsets.shape[0] - 1, scores.shape[1]
    bag = bag_of_rows(offsets, x.shape[0])
    scores = scores.masked_fill(~part[:, None], float("-inf"))
    top = scores.new_full((bags, maps), float("-inf")).scatter_reduce(0, bag[:, None].expand(-1, maps), scores.detach(), "amax")
    powers = (scores - top.masked_fill(top == float("-inf"), 0)[bag]).exp()
    sums = powers.new_zeros(bags, maps).index_add(0, bag, powers)
    weights = powers / sums.masked_fill(sums == 0, 1)[bag]
    if not pool:
        return weights * x, weights.T
    pooled = [x.new_zeros(bags, x.shape[1]).index_add(0, bag, weight[:, None] * x) for weight in weights.unbind(1)]
    return torch.stack(pooled, 1), weights.T


def _packed(image, shift, w_image, v, w_gate, shift_gate, mask, offsets, activation, pool):
    """One bag after another."""
    bounds = offsets.tolist()
    results, weights = [], []
    for bag, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        result, weight = attend(image[None, start:stop], None if shift is None else shift[bag:bag + 1], w_image, v, w_gate, shift_gate,
                                None if mask is None else mask[None, start:stop], None, activation, pool)
        results.append(result if pool else result[0])
        weights.append(weight[0])
    if results:
        return torch.cat(results), torch.cat(weights, -1)
    accumulate = torch.float64 if image.dtype == torch.float64 else torch.float32
    return image.new_zeros((0, len(v), image.shape[1]) if pool else image.shape), image.new_zeros(len(v), 0, dtype=accumulate)
