"""Gated cross-attention, as it is defined."""

import torch

from .precision import without_autocast


@without_autocast
def gated_cross_attention(query, key, value, gate=None, *, attn_mask=None, scale=None, need_weights=False):
    """See :func:`mmkernels.gated_cross_attention`. Runs in float32 (float64 for float64) inside."""
    dtype = query.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    query, key, value = (t.to(accumulate) for t in (query, key, value))
    gate = None if gate is None else gate.to(accumulate)
    attn_mask = full_mask(attn_mask, query, key)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # A query without any token, and a token without any query, may hold NaN: replaced before any arithmetic can
        # spread it.
        queries = attn_mask.any(3)[..., None]
        tokens = attn_mask.any(2)[..., None]
        query = query.where(queries, 0)
        key = key.where(tokens, 0)
        value = value.where(tokens, 0)
        gate = None if gate is None else gate.where(queries, 0)
    weights = attention_weights(query, key, attn_mask, scale)
    result = weights @ value
    result = (result if gate is None else gate * result).to(dtype)
    return (result, weights) if need_weights else result


def attention_weights(query, key, attn_mask, scale):
    """softmax over tokens of ``scale * query key^T``, masked; 0 where no token takes part (as SDPA has it)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.mT * scale
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return safe_softmax(scores, -1)


def safe_softmax(scores, dim):
    """softmax, but 0 where every score is -Inf: finite scores are put in their place, so that gradients are 0, too."""
    nothing = (scores == float("-inf")).all(dim, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(dim).masked_fill(nothing, 0)


def full_mask(attn_mask, query, key):
    """``attn_mask`` as a view ``[B, H, N, T]``."""
    return None if attn_mask is None else four_dimensional(attn_mask).expand(*query.shape[:3], key.shape[2])


def four_dimensional(attn_mask):
    """``attn_mask`` with four dimensions, of sizes 1 where it is the same for all; two dimensions are always ``[B,
    T]``."""
    if attn_mask.dim() == 2:
        return attn_mask[:, None, None]
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
