import torch
from torch.nn.functional import scaled_dot_product_attention

from ..reference.gated_cross_attention import full_mask
from .common import masked_softmax

__all__ = ["gated_cross_attention", "gated_cross_attention_flex", "gated_cross_attention_sdpa"]


def gated_cross_attention(query, key, value, gate=None, *, attn_mask=None, scale=None, need_weights=False):
    """Two products and a softmax. Weights come in query's dtype."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = masked_softmax(scores, full_mask(attn_mask, query, key))
    result = weights @ value
    result = result if gate is None else gate * result
    return (result, weights) if need_weights else result


def gated_cross_attention_sdpa(query, key, value, gate=None, *, attn_mask=None, scale=None):
    """PyTorch's fused attention, and a multiplication."""
    attn_mask = full_mask(attn_mask, query, key)
    result = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    return result if gate is None else gate * result


def gated_cross_attention_flex(query, key, value, gate=None, *, attn_mask=None, scale=None):
    """PyTorch's FlexAttention, and a multiplication: to be compiled. On the CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention  # it imports the compiler

    attn_mask = full_mask(attn_mask, query, key)
    masked = None
    if attn_mask is not None:

        def masked(score, b, h, n, t):
            entry = attn_mask[b, h, n, t]
            return torch.where(entry, score, -float("inf")) if entry.dtype == torch.bool else score + entry

    result = flex_attention(query, key, value, score_mod=masked, scale=scale)
    return result if gate is None else gate * result
