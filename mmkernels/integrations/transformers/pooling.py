"""Few queries that attend to a long image, with its projections absorbed: pooling heads, Q-Formers, the Perceiver.

Measured on one core with AVX2, beside SDPA with its projections: one query 5 to 70 x, also in bfloat16; Q-Former's 32
1.3 to 1.9 x and the Perceiver's 512 of one head 2.4 x in float32, and slower in bfloat16, whose products absorbed
attention takes in float32.
"""

import torch
from torch import nn

from ... import checks
from ...modules.absorb import absorbed_pooling
from ...modules.common import is_plain, is_plain_linear, join_heads, meet
from .. import multihead
from ..patching import Replacement, exported, plain
from ..pooling import learned, pays, plain_linears, projected_dtype
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
    heads, query, projections = module.num_heads, module.cls_token, (module.k_proj, module.v_proj)
    if not _absorbs(hidden_states, query, heads, *projections):
        return plain(module, hidden_states)
    width = query.shape[2] // heads
    pooled = _pool(hidden_states, query, heads, *projections, width**-0.5)
    return module.output_proj(pooled[:, 0])


def per_channel_forward(module, hidden_states, attention_mask=None, **named):
    """VideoPrism's: a learned query, scaled channel by channel."""
    query, projections = module.pooling_attention_query, (module.k_proj, module.v_proj)
    heads = module.k_proj.out_features // module.head_dim
    if (
        attention_mask is not None
        or not _may(module, module.attention_dropout, named)
        or not _absorbs(hidden_states, query, heads, *projections)
    ):
        return plain(module, hidden_states, attention_mask, **named)
    scale = module.scaling * nn.functional.softplus(module.per_dim_scale)
    query = module.q_proj(learned(query, len(hidden_states), module.q_proj)) * scale.repeat(heads)
    return module.o_proj(_pool(hidden_states, query, heads, *projections, 1.0)), None


def cross_forward(module, queries, keys, values, attention_mask=None):
    """V-JEPA 2's: a query that is given."""
    heads, projections = module.num_heads, (module.k_proj, module.v_proj)
    if (
        attention_mask is not None
        or keys is not values
        or not _may(module, module.dropout, {})
        or not _absorbs(keys, queries, heads, *projections)
    ):
        return plain(module, queries, keys, values, attention_mask)
    return _pool(keys, module.q_proj(queries), heads, *projections, module.scale), None


def convert_qformer(module):
    if module.key.in_features == module.query.in_features:
        return "queries attend to each other: nothing to absorb; set_attn_implementation('mmkernels') is for those"
    return plain_linears(module.key, module.value) or Replacement(OPERATION, qformer_forward, note=FLOAT32)


FLOAT32 = "in float32, where absorbing takes fewer operations"


def qformer_forward(
    module, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **named
):
    image, mask = encoder_hidden_states, encoder_attention_mask
    heads, projections = module.num_attention_heads, (module.key, module.value)
    if (
        image is None
        or len(image) != len(hidden_states)
        or (mask is not None and not _padding(mask))
        or not _may(module, module.attention_dropout, named)
        or not _absorbs(image, hidden_states, heads, *projections)
    ):
        return plain(module, hidden_states, attention_mask, image, mask, **named)
    mask = None if mask is None else mask[:, 0, 0].expand(len(image), -1)
    return _pool(image, module.query(hidden_states), heads, *projections, module.scaling, mask), None


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
    heads, projections = module.num_heads, (module.key, module.value)
    if (
        inputs is None
        or inputs_mask is not None
        or len(hidden_states) not in (1, len(inputs))
        or module.qk_channels != module.v_channels
        or not is_plain(module.dropout, nn.Dropout)
        or not _may(module, module.dropout.p, {"output_attentions": output_attentions})
        or not _absorbs(inputs, hidden_states, heads, *projections)
    ):
        return plain(module, hidden_states, attention_mask, inputs, inputs_mask, output_attentions)
    hidden_states, inputs = module.layernorm1(hidden_states), module.layernorm2(inputs)
    scale = module.qk_channels_per_head**-0.5
    return (_pool(inputs, module.query(hidden_states), heads, *projections, scale),)


def _may(module, dropout, named):
    """Whether neither dropout of weights nor the weights themselves are asked for."""
    if module.training and dropout:
        return False
    return not (named.get("output_attentions") or weights_wanted(module))


def _absorbs(image, query, heads, key, value):
    """Whether `query` ``[B or 1, T, E]``, not yet projected, pools the image faster absorbed. What projects it isn't
    asked: once called, it would be called again by the plain way."""
    if not (is_plain_linear(key) and is_plain_linear(value) and meet(query, image)):
        return False
    tokens = query.shape[1]
    if tokens > 1 and projected_dtype(image) != torch.float32:
        return False
    return pays(image, tokens, heads, key.weight.shape[0] // heads, key.weight, value.weight)


def _pool(image, query, heads, key, value, scale, mask=None):
    """With `query` ``[B or 1, T, H d]`` projected."""
    query = query.unflatten(2, (heads, -1)).transpose(1, 2)
    if not meet(query, image):
        checks.like("the projected query", query, "the image", image)
    pooled = absorbed_pooling(
        image, query, key.weight, value.weight, value.bias, scale, image_mask=mask, key_bias=key.bias
    )
    return join_heads(pooled).to(projected_dtype(image))
