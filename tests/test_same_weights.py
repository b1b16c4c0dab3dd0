"""Our modules with the weights of others', copied, compute what those do: results and all gradients, absorbed or not.

The truth is the other module in float64, the measure its error in the dtype.
"""

import copy

import pytest
import torch
from support.attention_tests import assert_rule, draw
from torch import nn

import mmkernels as mmk
from mmkernels.tolerance import half_an_epsilon_off

B, N, T, D, E = 3, 21, 5, 24, 10
MASK = torch.arange(B * N).view(B, N) % 4 > 0
TOKENS = torch.arange(B * T).view(B, T) % 3 > 0
PAIRS = torch.arange(B * N * T).view(B, 1, N, T) % 7 > 0


def multihead(module, of, query="query", key="key", value="value", out="out"):
    """What an nn.MultiheadAttention has, by the names that projections have in ours; `of` each, or of its gradient."""
    if module.in_proj_weight is None:
        weights = of(module.q_proj_weight), of(module.k_proj_weight), of(module.v_proj_weight)
    else:
        weights = of(module.in_proj_weight).chunk(3)
    found = {f"{name}_projection.weight": weight for name, weight in zip((query, key, value), weights)}
    found[f"{out}_projection.weight"] = of(module.out_proj.weight)
    if module.in_proj_bias is not None:
        biases = *of(module.in_proj_bias).chunk(3), of(module.out_proj.bias)
        found |= {f"{name}_projection.bias": bias for name, bias in zip((query, key, value, out), biases)}
    return found


def multihead_attention(image_dim, heads, bias, **options):
    module = nn.MultiheadAttention(image_dim, heads, bias=bias, batch_first=True, **options)
    for parameter in module.parameters():  # biases start as 0
        nn.init.normal_(parameter, std=image_dim**-0.5)
    return module


class Pooling(nn.Module):
    """A few queries over the image."""

    sizes = ((N, E), (T, D))
    masks = (None, MASK)
    biased = False

    def __init__(self, heads, bias):
        super().__init__()
        self.attention = multihead_attention(D, heads, bias, kdim=E, vdim=E)
        self.ours = lambda **options: mmk.AttentionPooling(E, heads, 1, D, D, embed_dim=D, bias=bias, **options)

    def forward(self, image, query, mask):
        masked = None if mask is None else ~mask
        return self.attention(query, image, image, key_padding_mask=masked, need_weights=False)[0]

    def parts(self, of):
        return multihead(self.attention, of)

    def call(self, module, image, query, mask):
        return module(image, query, image_mask=mask)


class Gated(nn.Module):
    """The gate stands before the last projection: that of the attention does nothing."""

    sizes = ((N, D), (T, E))
    masks = (None, TOKENS, PAIRS, torch.where(PAIRS, 0.5, -1.5))
    biased = False

    def __init__(self, heads, bias):
        super().__init__()
        self.heads = heads
        self.attention = multihead_attention(D, heads, bias, kdim=E, vdim=E)
        nn.init.eye_(self.attention.out_proj.weight)
        if bias:
            nn.init.zeros_(self.attention.out_proj.bias)
        self.gate, self.out = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=bias)
        self.ours = lambda **options: mmk.GatedCrossAttention(D, E, heads, bias=bias, **options)

    def forward(self, image, text, mask):
        options = {}
        if mask is not None and mask.dim() == 2:
            options["key_padding_mask"] = ~mask
        elif mask is not None:
            each = mask.expand(B, self.heads, N, T).flatten(0, 1)
            options["attn_mask"] = ~each if mask.dtype == torch.bool else each.to(image.dtype)
        attended, _ = self.attention(image, text, text, need_weights=False, **options)
        return self.out(self.gate(image).relu() * attended)

    def parts(self, of):
        found = multihead(self.attention, of)
        return found | {
            f"{name}_projection.{p}": of(t)
            for name in ("gate", "out")
            for p, t in getattr(self, name).named_parameters()
        }

    def call(self, module, image, text, mask):
        return module(image, text, mask=mask)


class Bidirectional(nn.Module):
    """One attention each way, with the same weights for the scores: their gradients add up."""

    sizes = ((N, D), (T, D))
    masks = (None, (MASK, TOKENS))
    biased = False

    def __init__(self, heads, bias):
        super().__init__()
        self.to_image, self.to_text = (multihead_attention(D, heads, bias) for _ in range(2))
        for name in ("in_proj_weight", "in_proj_bias"):
            if (given := getattr(self.to_image, name)) is not None:
                query, key, _ = given.data.chunk(3)
                getattr(self.to_text, name).data[: 2 * D] = torch.cat([key, query])
        self.ours = lambda **options: mmk.BidirectionalAttention(D, D, D, heads, bias=bias, **options)

    def forward(self, image, text, masks):
        image_masked, text_masked = (None, None) if masks is None else (~mask for mask in masks)
        return (
            self.to_image(image, text, text, key_padding_mask=text_masked, need_weights=False)[0],
            self.to_text(text, image, image, key_padding_mask=image_masked, need_weights=False)[0],
        )

    def parts(self, of):
        found = multihead(self.to_image, of, "image_query", "text_key", "text_value", "image_out")
        other = multihead(self.to_text, of, "text_key", "image_query", "image_value", "text_out")
        if of(self.to_image.in_proj_weight) is self.to_image.in_proj_weight:
            return found | other
        return found | other | {name: found[name] + other[name] for name in found.keys() & other.keys()}

    def call(self, module, image, text, masks):
        image_mask, text_mask = (None, None) if masks is None else masks
        return module(image, text, image_mask=image_mask, text_mask=text_mask)


class Siglip(nn.Module):
    """transformers' pooling head. What follows the attention is its own."""

    sizes = ((N, D),)
    masks = (None,)
    biased = True

    def __init__(self, heads, bias):
        super().__init__()
        siglip = pytest.importorskip(
            "transformers.models.siglip.modeling_siglip", reason="transformers isn't installed"
        )
        config = siglip.SiglipVisionConfig(hidden_size=D, intermediate_size=32, num_attention_heads=heads)
        self.head = siglip.SiglipMultiheadAttentionPoolingHead(config)
        nn.init.normal_(self.head.attention.in_proj_bias)
        self.ours = lambda **options: mmk.AttentionPooling(D, heads, **options)

    def forward(self, image, mask):
        return self.head(image)

    def parts(self, of):
        return {"query": of(self.head.probe)[0]} | multihead(self.head.attention, of)

    def call(self, module, image, mask):
        pooled = module(image)
        after = copy.deepcopy(self.head).to(image.dtype)
        return (pooled + after.mlp(after.layernorm(pooled)))[:, 0]


class Clip(nn.Module):
    """open_clip's attention pool: the mean is the query, and the first of the positions."""

    sizes = ((D, 4, 5),)
    masks = (None,)
    biased = True

    def __init__(self, heads, bias):
        super().__init__()
        resnet = pytest.importorskip("open_clip.modified_resnet", reason="open_clip isn't installed")
        self.pool = resnet.AttentionPool2d(5, D, heads, 7)
        self.pool.positional_embedding = nn.Parameter(draw(21, D) / 5)
        self.ours = lambda **options: mmk.AttentionPooling(D, heads, query_dim=D, out_dim=7, **options)

    def forward(self, image, mask):
        return self.pool(image)

    def parts(self, of):
        names = {"query": "q", "key": "k", "value": "v", "out": "c"}
        return {
            f"{name}_projection.{p}": of(t)
            for name, theirs in names.items()
            for p, t in getattr(self.pool, f"{theirs}_proj").named_parameters()
        }

    def call(self, module, image, mask):
        image = image.flatten(2).mT
        image = torch.cat([image.mean(1, keepdim=True), image], 1) + self.pool.positional_embedding.detach().to(
            image.dtype
        )
        return module(image, image[:, :1])[:, 0]


class QFormer(nn.Module):
    """BLIP-2's cross-attention, which has its last projection elsewhere."""

    sizes = ((N, E), (T, D))
    masks = (None, MASK)
    biased = True

    def __init__(self, heads, bias):
        super().__init__()
        blip = pytest.importorskip("transformers.models.blip_2.modeling_blip_2", reason="transformers isn't installed")
        config = blip.Blip2QFormerConfig(
            hidden_size=D, num_attention_heads=heads, encoder_hidden_size=E, attention_probs_dropout_prob=0.0
        )
        config._attn_implementation = "eager"
        self.attention = blip.Blip2QFormerMultiHeadAttention(config, is_cross_attention=True)

        def ours(**options):
            module = mmk.AttentionPooling(E, heads, 1, D, D, embed_dim=D, **options)
            module.out_projection = nn.Identity()
            return module

        self.ours = ours

    def forward(self, image, query, mask):
        if mask is not None:
            least = torch.finfo(image.dtype).min
            mask = torch.zeros(mask.shape, dtype=image.dtype).masked_fill(~mask, least)[:, None, None]
        return self.attention(query, encoder_hidden_states=image, encoder_attention_mask=mask)[0]

    def parts(self, of):
        return {
            f"{name}_projection.{p}": of(t)
            for name in ("query", "key", "value")
            for p, t in getattr(self.attention, name).named_parameters()
        }

    def call(self, module, image, query, mask):
        return module(image, query, image_mask=mask)


def computed(call, module, tensors, mask, parts):
    """Results, gradients of the inputs, and of the parameters by their names in our module."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    module.zero_grad()
    results = call(*leaves, mask)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [draw(*r.shape, seed=9 + i).to(r.dtype) for i, r in enumerate(results)])
    grads = parts(lambda p: p.grad)
    return [*(r.detach() for r in results), *(t.grad for t in leaves), *(grads[name] for name in sorted(grads))]


def assert_same(other, dtype, mask, **options):
    other = other.to(dtype)
    ours = other.ours(**options).to(dtype)
    ours.load_state_dict(other.parts(lambda p: p))
    tensors = [draw(B, *size, seed=i).to(dtype) for i, size in enumerate(other.sizes)]
    named = dict(ours.named_parameters())
    found = computed(
        lambda *given: other.call(ours, *given), ours, tensors, mask, lambda of: {n: of(p) for n, p in named.items()}
    )

    def theirs(dtype, change=lambda t: t):
        copied = copy.deepcopy(other).to(dtype)
        for parameter, given in zip(copied.parameters(), other.parameters()):
            parameter.data = change(given.data).to(dtype)
        return computed(copied, copied, [change(t).to(dtype) for t in tensors], mask, copied.parts)

    narrow = theirs(torch.float32) if dtype == torch.float64 else None
    truth, rounded = theirs(torch.float64), theirs(torch.float64, half_an_epsilon_off)
    assert_rule(found, truth, theirs(dtype), narrow, batch=B, rounded=rounded)


OTHERS = [Pooling, Gated, Bidirectional, Siglip, Clip, QFormer]
CASES = [
    pytest.param(kind, heads, bias, i, id=f"{kind.__name__}-{heads} heads-bias {bias}-mask {i}")
    for kind in OTHERS
    for heads, bias in ((1, True), (3, True), (3, False))
    for i in range(len(kind.masks))
    if bias or not kind.biased
]


@pytest.mark.parametrize("other, heads, bias, mask", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_others(extension, other, heads, bias, mask, dtype):
    masked = other.masks[mask]
    for absorb in (None, True, False):
        if absorb and other is Gated and mask > 1:
            continue  # masks of pairs exclude it
        torch.manual_seed(0)
        assert_same(other(heads, bias), dtype, masked, absorb=absorb)
