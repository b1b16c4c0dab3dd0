"""Few queries that attend to a long image, with its projections absorbed: pooling heads, Q-Formers, the Perceiver.

Measured on one core with AVX2, beside SDPA with its projections: one query 5 to 70 x, also in bfloat16; Q-Former's 32
1.3 to 1.9 x and the Perceiver's 512 of one head 2.4 x in float32, and slower in bfloat16, whose products absorbed
attention takes in float32.
"""

import torch
from torch import nn

from ...modules.absorb import absorbed_pooling
from ...modules.common import is_plain, is_plain_linear, join_heads
from .. import multihead
from ..patching import Replacement, exported, plain
from ..pooling import pays, plain_linears
from .weights import weights_wanted

OPERATION = "absorbed_attention"


def convert_probe(module):
    if module.training and module.attention.dropout:
        return f"it trains with dropout {module.attention.dropout} of attention weights, which are never written"
    return Replacement(OPERATION, probe_forward)


def probe_forward(module, hidden_state, attention_mask=None):
    """SigLIP's, SigLIP 2's, Idefics2's and Phi-4's: an ``nn.MultiheadAttention`` with one learned query, whose weights
    are thrown away. `attention_mask` ``[B, N]``, True (1) = takes part."""
    attention = module.attention
    if not is_plain(attention, nn.MultiheadAttention) or exported() or (module.training and attention.dropout):
        return plain(module, hidden_state, *(() if attention_mask is None else (attention_mask,)))
    probe = module.probe.expand(len(hidden_state), -1, -1)
    padding = None if attention_mask is None else ~attention_mask.bool()
    pooled, _ = multihead.forward(
        attention, probe, hidden_state, hidden_state, key_padding_mask=padding, need_weights=False
    )
    return (pooled + module.mlp(module.layernorm(pooled)))[:, 0]


def convert_class_token(module):
    return _convert_projected(module, class_token_forward)


def convert_per_channel(module):
    return _convert_projected(module, per_channel_forward)


def convert_cross(module):
    return _convert_projected(module, cross_forward)


def _convert_projected(module, forward):
    return plain_linears(module.k_proj, module.v_proj) or Replacement(OPERATION, forward)


def class_token_forward(module, hidden_states):
    """AIMv2's: a learned query as it is."""
    heads = module.num_heads
    query = module.cls_token.unflatten(2, (heads, -1)).transpose(1, 2)
    if not _absorbs(module, hidden_states, query, module.k_proj, module.v_proj):
        return plain(module, hidden_states)
    pooled = _pool(hidden_states, query, module.k_proj, module.v_proj, query.shape[3] ** -0.5)
    return module.output_proj(pooled[:, 0])


def per_channel_forward(module, hidden_states, attention_mask=None, **named):
    """VideoPrism's: a learned query, scaled channel by channel."""
    query = module.pooling_attention_query
    if (
        attention_mask is not None
        or not _may(module, module.attention_dropout, named)
        or query.dtype != hidden_states.dtype
    ):
        return plain(module, hidden_states, attention_mask, **named)
    query = module.q_proj(query).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
    if not _absorbs(module, hidden_states, query, module.k_proj, module.v_proj):
        return plain(module, hidden_states, attention_mask, **named)
    query = query * module.scaling * nn.functional.softplus(module.per_dim_scale)
    return module.o_proj(_pool(hidden_states, query, module.k_proj, module.v_proj, 1.0)), None


def cross_forward(module, queries, keys, values, attention_mask=None):
    """V-JEPA 2's: a query that is given."""
    heads, width = module.num_heads, module.head_dim
    if attention_mask is not None or keys is not values or not _may(module, module.dropout, {}):
        return plain(module, queries, keys, values, attention_mask)
    query = module.q_proj(queries).unflatten(2, (heads, width)).transpose(1, 2)
    if not _absorbs(module, keys, query, module.k_proj, module.v_proj):
        return plain(module, queries, keys, values, attention_mask)
    return _pool(keys, query, module.k_proj, module.v_proj, module.scale), None


def convert_qformer(module):
    if module.key.in_features == module.query.in_features:
        return "queries attend to each other: nothing to absorb; set_attn_implementation('mmkernels') is for those"
    return plain_linears(module.key, module.value) or Replacement(OPERATION, qformer_forward, note=FLOAT32)


FLOAT32 = "in float32, where absorbing takes fewer operations"


def qformer_forward(
    module, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **named
):
    image = encoder_hidden_states
    rest = attention_mask, encoder_hidden_states, encoder_attention_mask
    if image is None or len(image) != len(hidden_states) or not _may(module, module.attention_dropout, named):
        return plain(module, hidden_states, *rest, **named)
    query = module.query(hidden_states).unflatten(2, (module.num_attention_heads, -1)).transpose(1, 2)
    mask = encoder_attention_mask
    if (mask is not None and not _padding(mask)) or not _absorbs(module, image, query, module.key, module.value):
        return plain(module, hidden_states, *rest, **named)
    mask = None if mask is None else mask[:, 0, 0].expand(len(image), -1)
    return _pool(image, query, module.key, module.value, module.scaling, mask), None


def _padding(mask):
    """Whether the mask is bool and the same for all queries and heads, by its shape."""
    same = mask.dim() == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0)
    return same and mask.dtype == torch.bool


def convert_perceiver(module):
    if type(module.layernorm2) is nn.Identity:
        return "latents attend to each other: nothing to absorb"
    return plain_linears(module.key, module.value) or Replacement(OPERATION, perceiver_forward, note=FLOAT32)


def perceiver_forward(
    module, hidden_states, attention_mask=None, inputs=None, inputs_mask=None, output_attentions=False
):
    rest = attention_mask, inputs, inputs_mask, output_attentions
    if inputs is None or inputs_mask is not None or module.qk_channels != module.v_channels:
        return plain(module, hidden_states, *rest)
    if not _may(module, module.dropout.p, {"output_attentions": output_attentions}):
        return plain(module, hidden_states, *rest)
    query = module.query(module.layernorm1(hidden_states)).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
    if len(query) not in (1, len(inputs)) or not _absorbs(module, inputs, query, module.key, module.value):
        return plain(module, hidden_states, *rest)
    scale = module.qk_channels_per_head**-0.5
    return (_pool(module.layernorm2(inputs), query, module.key, module.value, scale),)


def _may(module, dropout, named):
    """Whether neither dropout of weights nor the weights themselves are asked for."""
    if module.training and dropout:
        return False
    return not (named.get("output_attentions") or weights_wanted(module))


def _absorbs(module, image, query, key, value):
    """Whether `query` ``[B or 1, H, T, d]`` pools the image faster absorbed."""
    _, heads, tokens, width = query.shape
    if not (is_plain_linear(key) and is_plain_linear(value)) or query.dtype != image.dtype:
        return False
    if tokens > 1 and image.dtype != torch.float32:
        return False
    return pays(image, tokens, heads, width, key.weight, value.weight)


def _pool(image, query, key, value, scale, mask=None):
    return join_heads(
        absorbed_pooling(image, query, key.weight, value.weight, value.bias, scale, image_mask=mask, key_bias=key.bias)
    )
