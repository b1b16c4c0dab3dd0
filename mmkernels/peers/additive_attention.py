import torch
from torch.nn.functional import linear

from ..reference.additive_attention import ACTIVATIONS, wanted
from ..reference.dropout import GATE, HIDDEN, draw_seed, dropout_factors
from .common import masked_softmax

__all__ = ["additive_attention"]


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
    """Linear layers, activation, softmax, weighted sum. Weights and scores come in image's dtype."""
    network = {
        "v": v,
        "w_image": w_image,
        "w_gate": w_gate,
        "bias_gate": bias_gate,
        "activation": activation,
        "combine": combine,
    }
    factors = _factors(image, len(v[0]), w_gate is not None, dropout_p)
    bias_hidden = bias if query is None else linear(query, w_query, bias)
    if offsets is None:
        result, weights, scores = _additive(
            image,
            None if bias_hidden is None else bias_hidden if bias_hidden.dim() == 1 else bias_hidden[:, None],
            mask,
            factors,
            **network,
        )
    else:  # bags: one after another, as most code does
        bounds = offsets.tolist()
        bags = [
            _additive(
                image[None, start:stop],
                bias_hidden if bias_hidden is None or bias_hidden.dim() == 1 else bias_hidden[i : i + 1, None],
                None if mask is None else mask[None, start:stop],
                [f[None, start:stop] for f in factors],
                **network,
            )
            for i, (start, stop) in enumerate(zip(bounds, bounds[1:]))
        ]
        pool = combine == "pool"
        result = (
            torch.cat([r if pool else r[0] for r, _, _ in bags])
            if bags
            else image.new_zeros((0, len(v), image.shape[1]) if pool else image.shape)
        )
        weights, scores = (
            torch.cat([bag[i][0] for bag in bags], -1) if bags else image.new_zeros(len(v), 0) for i in (1, 2)
        )
    return wanted(result, (weights, need_weights), (scores, need_scores))


def _factors(image, hidden, gated, p):
    """What the operation's dropout multiplies hidden units and gates with: another draw would be another function."""
    if not p:
        return []
    seed = draw_seed(image.device)
    which = (HIDDEN, GATE) if gated else (HIDDEN,)
    return [dropout_factors(seed, image.shape[:-1], hidden, each, p, image.dtype) for each in which]


def _additive(image, bias_hidden, mask, factors, *, v, w_image, w_gate, bias_gate, activation, combine):
    hidden = linear(image, w_image)
    hidden = ACTIVATIONS[activation](hidden if bias_hidden is None else hidden + bias_hidden)
    if factors:
        hidden = hidden * factors[0]
    if w_gate is not None:
        gate = torch.sigmoid(linear(image, w_gate, bias_gate))
        hidden = hidden * (gate * factors[1] if factors else gate)
    scores = linear(hidden, v).mT
    weights = masked_softmax(scores, None if mask is None else mask[:, None])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return (weights @ image if combine == "pool" else weights.mT * image), weights, scores
