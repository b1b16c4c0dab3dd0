"""Attention by name: ``model.set_attn_implementation("mmkernels")``."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ... import functional
from ...torch_private import known_true
from ..patching import exported

NAME = "mmkernels"
# What SDPA would leave out without a word, by the names that models have for it.
SINKS = ("s_aux", "sinks")


def register():
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, **options
):
    """SDPA's bool mask ``[B, 1, N, T]``. Of padding alone one row is made, which stands for all queries."""
    rows = 1 if mask_function is bidirectional_mask_function else q_length
    mask = sdpa_mask(batch_size, rows, kv_length, q_offset, kv_offset, mask_function, **options)
    return mask if mask is None or rows == q_length else mask.expand(-1, -1, q_length, -1)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    position_bias=None,
    **options,
):
    """As transformers calls it: query ``[B, H, N, d]``; key and value may have fewer heads, each for as many of query's
    that follow each other. Returns ``[B, N, H, dv]`` and no weights."""
    for name in SINKS:
        if options.get(name) is not None:
            raise ValueError(f"{name} (attention sinks) aren't supported by {NAME!r}: set_attn_implementation('eager')")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    positions = query.shape[2]
    if (
        dropout
        or position_bias is not None
        or options.get("softcap") is not None
        or options.get("output_attentions")
        or (causal and attention_mask is None and positions > 1)
        or query.device.type != "cpu"
        or exported()
        or not _faster(query, key)
        or not _fits(query, key, value, attention_mask)
    ):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **options,
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]  # the same for all queries
    return _attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _fits(query, key, value, mask):
    """Whether the operation takes it, with a mask that is the same for all queries: with one of each query's own
    nothing is gained (0.8 to 1.1 x SDPA)."""
    batch, heads, positions, _ = query.shape
    if len(key) != batch or len(value) != batch or heads % key.shape[1]:
        return False
    if mask is None:
        return True
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        return False
    if mask.shape[3] != key.shape[2]:
        return False
    return mask.shape[2] == 1 or (mask.shape[2] == positions and mask.stride(2) == 0)


def _faster(query, key):
    """Whether SDPA is slower, as measured on one core with AVX2: 1.1 to 1.4 x in float32, 1.2 to 1.7 x in bfloat16, and
    there by factors with one query. With few queries, tokens or scores it isn't; nor is it where an exported graph
    leaves sizes open, which these limits would close."""
    batch, heads, positions, _ = query.shape
    tokens = key.shape[2]
    scores = batch * heads * positions * tokens
    if known_true(positions == 1):
        return query.dtype == torch.bfloat16 and heads == key.shape[1] and known_true(scores >= 1 << 11)
    return known_true(positions >= 32) and known_true(tokens >= 32) and known_true(scores >= 1 << 17)


def _attend(query, key, value, mask, scale):
    """Key and value heads that several of query's share are views, sample by sample: over a batch, heads that follow
    each other can't be strided over as one dimension."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return functional.gated_cross_attention(query, key, value, attn_mask=mask, scale=scale)
    samples = []
    for b in range(len(query)):
        own = mask if mask is None else mask[b % len(mask)]
        if own is not None:
            own = own[None] if len(own) == 1 else own.unflatten(0, (key.shape[1], groups))
        shared = (t[b, :, None].expand(-1, groups, -1, -1) for t in (key, value))
        heads = query[b].unflatten(0, (key.shape[1], groups))
        samples.append(functional.gated_cross_attention(heads, *shared, attn_mask=own, scale=scale).flatten(0, 1))
    return torch.stack(samples)
