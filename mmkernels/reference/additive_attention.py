"""Additive attention, as it is defined."""

import torch
from torch.nn.functional import gelu

from .bags import Bags, bag_bounds
from .dropout import GATE, HIDDEN, draw_seed, dropout_factors
from .precision import without_autocast

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": gelu}


@without_autocast
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
):
    """See :func:`mmkernels.additive_attention`. Runs in float32 (float64 for float64) inside."""
    offsets = bag_bounds(offsets, image)
    inputs = image, query, w_image, w_query, v, bias, w_gate, bias_gate, mask, offsets
    seed = draw_seed(image.device) if dropout_p else None
    result, weights, scores = attend(*inputs, seed, activation, combine == "pool", dropout_p)
    return wanted(result, (weights, need_weights), (scores, need_scores))


@without_autocast
def attend(
    image,
    query,
    w_image,
    w_query,
    v,
    bias,
    w_gate,
    bias_gate,
    mask,
    offsets,
    seed,
    activation,
    pool,
    dropout_p,
):
    """(result, weights, scores); without dropout ``seed`` is None."""
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    x, query, w_image, w_query, v, bias, w_gate, bias_gate = (
        None if t is None else t.to(accumulate) for t in (image, query, w_image, w_query, v, bias, w_gate, bias_gate)
    )
    part = torch.ones(image.shape[:-1], dtype=torch.bool, device=image.device) if mask is None else mask
    x = x.where(part[..., None], 0)  # what is masked out may hold NaN: replaced before any arithmetic can spread it

    bags = None if offsets is None else Bags.of(offsets, image.shape[0])
    bias_hidden = bias
    if query is not None:
        of_query = query @ w_query.T if bias is None else query @ w_query.T + bias
        bias_hidden = of_query[:, None] if bags is None else bags.spread(of_query)
    hidden = ACTIVATIONS[activation](x @ w_image.T if bias_hidden is None else x @ w_image.T + bias_hidden)
    hidden = drop(hidden, seed, HIDDEN, dropout_p)
    if w_gate is not None:
        gate = x @ w_gate.T
        gate = torch.sigmoid(gate if bias_gate is None else gate + bias_gate)
        hidden = hidden * drop(gate, seed, GATE, dropout_p)
    result, weights, scores = _combine(hidden @ v.T, x, part, bags, pool)
    return result.to(dtype), weights, scores


def drop(units, seed, which, p):
    """Hidden units ``[B, N, A]``, packed ``[rows, A]``, after dropout, if there is a seed."""
    if seed is None:
        return units
    return units * dropout_factors(seed, units.shape[:-1], units.shape[-1], which, p, units.dtype)


def wanted(result, *others):
    """The result, and those of (tensor, needed) that are, if any."""
    needed = [tensor for tensor, need in others if need]
    return (result, *needed) if needed else result


@without_autocast
def combine_positions(image, scores, mask, bags, pool):
    """(result, weights, scores) of scores ``[B, N, K]``, packed ``[rows, K]``; where it is masked, image is finite."""
    dtype = image.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    image = image.to(accumulate)
    scores = scores.to(accumulate)
    part = torch.ones(image.shape[:-1], dtype=torch.bool, device=image.device) if mask is None else mask
    result, weights, scores = _combine(scores, image, part, bags, pool)
    return result.to(dtype), weights, scores


def _combine(scores, x, part, bags, pool):
    combine = _dense(scores, x, part, pool) if bags is None else _packed(scores, x, part, bags, pool)
    return *combine, scores.mT.masked_fill(~part[..., None, :], float("-inf"))


def _dense(scores, x, part, pool):
    scores = scores.transpose(1, 2)
    # A sample without any position keeps finite scores, so that its weights and gradients become 0, not NaN.
    some = part.any(1)[:, None, None]
    weights = scores.masked_fill(~part[:, None] & some, float("-inf")).softmax(-1).masked_fill(~part[:, None], 0)
    return weights @ x if pool else weights.transpose(1, 2) * x, weights


def _packed(scores, x, part, bags, pool):
    weights = bags.softmax(scores, part)
    if not pool:
        return weights * x, weights.T
    maps = [bags.sums(w[:, None] * x) for w in weights.unbind(1)]  # one by one: together they are K times the image
    return torch.stack(maps, 1), weights.T
