"""timm: attention pooling, and the context block of GCNet."""

import torch
from torch import nn

from .. import functional
from ..modules.absorb import absorbed_pooling
from ..modules.common import is_plain, is_plain_linear, join_heads, meet, reaching
from .patching import Replacement, exported, plain
from .pooling import attend, chunks, learned, pays, plain_linears


def convert_latent(module):
    if type(module.k_norm) is not nn.Identity:
        return "its keys are normalised after their projection, which can't be absorbed"
    return plain_linears(module.kv) or Replacement("absorbed_attention", latent_forward)


def latent_forward(module, x, attn_mask=None):
    """``AttentionPoolLatent``: learned queries."""
    kv, heads, width = module.kv, module.num_heads, module.head_dim
    tokens = module.latent_len
    own = is_plain_linear(kv) and is_plain(module.k_norm, nn.Identity)
    if attn_mask is not None or not own or not pays(x, tokens, heads, width, kv.weight):
        return plain(module, x, attn_mask)
    if module.pos_embed is not None:
        x = x + module.pos_embed.unsqueeze(0).to(x.dtype)
    query = module.q(learned(module.latent, len(x), module.q, module.q_norm))
    query = module.q_norm(query.unflatten(2, (heads, width)).transpose(1, 2))
    key_bias, value_bias = chunks(kv.bias, 2)
    x = absorbed_pooling(x, query, *kv.weight.chunk(2), value_bias, module.scale, key_bias=key_bias)
    x = module.proj_drop(module.proj(join_heads(x)))
    if module.mlp is not None:
        x = x + module.mlp(module.norm(x))
    if module.pool == "token":
        return x[:, 0]
    return x.mean(1) if module.pool == "avg" else x


def convert_pool2d(module):
    if module.pool_type != "token":
        return "every position is a query of its own (pool_type isn't 'token')"
    if module.training and module.drop.p:
        return f"it trains with dropout {module.drop.p}"
    projections = (module.qkv,) if module.qkv is not None else (module.q, module.k, module.v)
    return plain_linears(*projections) or Replacement("absorbed_attention", pool2d_forward)


def pool2d_forward(module, x, pre_logits=False):
    """``AttentionPool2d``, CLIP's: the mean, or a class token, is the query. timm computes every position's, and keeps
    the first."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    heads, width = module.num_heads, module.head_dim
    linears = (module.qkv,) if module.qkv is not None else (module.q, module.k, module.v)
    size = x.shape[2:]
    image = x.flatten(2).mT
    if (
        module.pool_type != "token"
        or (module.training and module.drop.p)
        or not all(map(is_plain_linear, linears))
        or not is_plain(module.drop, nn.Dropout)
        or not (is_plain_linear(module.proj) or is_plain(module.proj, nn.Identity))
        or not pays(image, 1, heads, width, *(linear.weight for linear in linears))
    ):
        return plain(module, x, pre_logits)
    first = image.mean(1, keepdim=True) if module.cls_token is None else module.cls_token.expand(len(image), -1, -1)
    positions = resample_abs_pos_embed(
        module.pos_embed.unsqueeze(0), tuple(size), old_size=module.feat_size, num_prefix_tokens=1
    )
    image = torch.cat([first, image], dim=1) + positions
    if module.qkv is not None:
        weights, biases = module.qkv.weight.chunk(3), chunks(module.qkv.bias, 3)
    else:
        weights, biases = zip(*((linear.weight, linear.bias) for linear in linears))
    pooled = module.drop(attend(image, image[:, :1], weights, biases, heads, module.scale))
    return (pooled if pre_logits else module.proj(pooled))[:, 0]


def convert_context(module):
    if module.conv_attn is None:
        return "it takes the mean, without attention (use_attn=False)"
    if not is_plain_linear(module.conv_attn, nn.Conv2d):
        return f"what scores inside of it is a {type(module.conv_attn).__name__}, not a plain Conv2d without hooks"
    return Replacement("spatial_attention", context_forward)


def context_forward(module, x):
    """``GlobalContext``: every position is scored by one learned vector. What the bias adds cancels in the softmax."""
    conv = module.conv_attn
    if not is_plain_linear(conv, nn.Conv2d) or exported() or not meet(x, conv.weight):
        return plain(module, x)
    vector = conv.weight.view(1, -1).expand(x.shape[0], -1)
    context = functional.spatial_attention(x, vector, scale=1.0, combine="pool", layout="bdhw")
    context = reaching(context, conv.bias)[:, :, None, None]
    if module.mlp_scale is not None:
        x = x * module.gate(module.mlp_scale(context))
    if module.mlp_add is not None:
        x = x + module.mlp_add(context)
    return x


CONVERTERS = {
    "timm.layers.attention_pool.AttentionPoolLatent": convert_latent,
    "timm.layers.attention_pool2d.AttentionPool2d": convert_pool2d,
    "timm.layers.attention_pool2d.RotAttentionPool2d": lambda module: (
        "its keys are rotated after their projection, which can't be absorbed"
    ),
    "timm.layers.global_context.GlobalContext": convert_context,
}
