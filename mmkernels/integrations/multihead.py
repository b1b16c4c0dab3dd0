"""``nn.MultiheadAttention``, where few queries attend to a long image: pooling heads, CoCa's pooler."""

import torch
from torch.nn.functional import linear

from ..modules.common import meet
from .patching import Replacement, plain
from .pooling import attend, chunks, pays


def convert(module):
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds a key of its own (bias_k, add_zero_attn)"
    if module.training and module.dropout:
        return f"it trains with dropout {module.dropout} of attention weights, which are never written"
    return Replacement(
        "absorbed_attention", forward, note="calls with few queries that don't ask for weights (need_weights=False)"
    )


def forward(
    module,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    rest = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
    masked = (
        attn_mask is not None or is_causal or (key_padding_mask is not None and key_padding_mask.dtype != torch.bool)
    )
    if need_weights or masked or key is not value or (module.training and module.dropout):
        return plain(module, query, key, value, *rest)
    if query.dim() != 3 or query.is_nested or key.is_nested:
        return plain(module, query, key, value, *rest)
    image = key if module.batch_first else key.transpose(0, 1)
    tokens = query if module.batch_first else query.transpose(0, 1)
    heads, width = module.num_heads, module.head_dim
    weights = weights_of(module)
    if not meet(tokens, image) or not pays(image, tokens.shape[1], heads, width, *weights, module.out_proj.weight):
        return plain(module, query, key, value, *rest)
    mask = None if key_padding_mask is None else ~key_padding_mask
    pooled = attend(image, tokens, weights, chunks(module.in_proj_bias, 3), heads, width**-0.5, mask)
    result = linear(pooled, module.out_proj.weight, module.out_proj.bias)
    return (result if module.batch_first else result.transpose(0, 1)), None


def weights_of(module):
    """Query's, key's and value's, ``[E, channels]``."""
    if module.in_proj_weight is not None:
        return module.in_proj_weight.chunk(3)
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight


CONVERTERS = {"torch.nn.modules.activation.MultiheadAttention": convert}
