from torch.nn.functional import scaled_dot_product_attention

from ..reference.gated_cross_attention import full_mask
from .common import masked_softmax

__all__ = ["gated_cross_attention", "gated_cross_attention_sdpa"]


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
