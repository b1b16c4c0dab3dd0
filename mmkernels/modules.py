"""The operations as modules: they hold the projections that bring text to the image's channels."""

import torch
from torch import nn

from . import functional


class SpatialAttention(nn.Module):
    """Projects the text to the image's channels and weighs every image position by how well it matches.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, size of the text vector.
        num_heads: H, divides ``image_dim``.
        combine, rescale, layout, scale: as in :func:`mmkernels.spatial_attention`.
        bias: whether the text projection has a bias.
        backend: as in :func:`mmkernels.spatial_attention`; ``"reference"`` gives the plain layer.

    Shape:
        image ``[B, N, D]`` or ``[B, D, Y, X]`` (by ``layout``), text ``[B, E]`` ->
        like image (``combine="multiply"``) or ``[B, D]`` (``"pool"``).
    """

    def __init__(self, image_dim, text_dim, *, num_heads=1, combine="multiply", rescale=False, layout="bnd",
                 scale=None, bias=True, backend=None, device=None, dtype=None):
        super().__init__()
        _check_heads(num_heads, image_dim=image_dim)
        self.image_dim, self.text_dim, self.num_heads = image_dim, text_dim, num_heads
        self.combine, self.rescale, self.layout, self.scale = combine, rescale, layout, scale
        self.backend = backend
        self.text_projection = nn.Linear(text_dim, image_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, image, text, *, mask=None, offsets=None, need_weights=False):
        return functional.spatial_attention(
            image, self.text_projection(text), mask=mask, offsets=offsets, scale=self.scale, num_heads=self.num_heads,
            combine=self.combine, rescale=self.rescale, layout=self.layout, need_weights=need_weights,
            backend=self.backend)

    def extra_repr(self):
        return (f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, "
                f"combine={self.combine!r}, rescale={self.rescale}, layout={self.layout!r}, backend={self.backend!r}")


class GatedCrossAttention(nn.Module):
    """Image positions attend to text tokens, and the result multiplies the image's own features.

    ``out(gate * attention)``: query and gate are projections of the image, key and value of the text, the gate with an activation.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, channels of the text tokens.
        num_heads: H, divides ``embed_dim`` and ``value_dim``.
        embed_dim: channels of query and key, all heads together; default ``image_dim``.
        value_dim: channels of value and gate; default ``image_dim``.
        gate_activation: a module between the gate's projection and the multiplication; default ``nn.ReLU()``; ``nn.Identity()`` for none.
        norm: a module for ``[B, N, value_dim]`` between attention and gate, e.g. ``nn.LayerNorm(value_dim)``. With one, as in LAVT's
            pixel-word attention (whose norm is over positions), the gate can't be fused: it is multiplied after the norm, by PyTorch.
        bias: whether the projections have one.
        scale, backend: as in :func:`mmkernels.gated_cross_attention`.

    Shape:
        image ``[B, N, D]``, text ``[B, T, E]``, mask bool ``[B, T]`` (True = a token, False = padding) or anything that
        :func:`mmkernels.gated_cross_attention` takes -> ``[B, N, D]``.

    Source: Yang et al. 2022 (arXiv:2112.02244), section 3.2.
    """

    def __init__(self, image_dim, text_dim, num_heads=1, *, embed_dim=None, value_dim=None, gate_activation=None, norm=None,
                 bias=True, scale=None, backend=None, device=None, dtype=None):
        super().__init__()
        embed_dim, value_dim = embed_dim or image_dim, value_dim or image_dim
        _check_heads(num_heads, embed_dim=embed_dim, value_dim=value_dim)
        self.image_dim, self.text_dim, self.num_heads, self.scale, self.backend = image_dim, text_dim, num_heads, scale, backend
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.query_projection = nn.Linear(image_dim, embed_dim, **options)
        self.gate_projection = nn.Linear(image_dim, value_dim, **options)
        self.key_projection = nn.Linear(text_dim, embed_dim, **options)
        self.value_projection = nn.Linear(text_dim, value_dim, **options)
        self.gate_activation = nn.ReLU() if gate_activation is None else gate_activation
        self.norm = norm
        self.out_projection = nn.Linear(value_dim, image_dim, **options)

    def forward(self, image, text, *, mask=None, need_weights=False):
        query, key, value = self.query_projection(image), self.key_projection(text), self.value_projection(text)
        gate = self.gate_activation(self.gate_projection(image))
        query, key, value = (_split_heads(t, self.num_heads) for t in (query, key, value))
        found = functional.gated_cross_attention(
            query, key, value, _split_heads(gate, self.num_heads) if self.norm is None else None, attn_mask=mask, scale=self.scale,
            need_weights=need_weights, backend=self.backend)
        result, weights = found if need_weights else (found, None)
        result = _join_heads(result)
        if self.norm is not None:
            result = gate * self.norm(result)
        result = self.out_projection(result)
        return (result, weights) if need_weights else result

    def extra_repr(self):
        return f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, backend={self.backend!r}"


class BidirectionalAttention(nn.Module):
    """Image and text attend to each other, from one score matrix: the fusion layer of GLIP and Grounding DINO.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, channels of the text tokens.
        embed_dim: channels of queries, keys and values, all heads together.
        num_heads: H, divides ``embed_dim``.
        bias: whether the projections have one.
        scale, backend: as in :func:`mmkernels.bidirectional_attention`.

    Shape:
        image ``[B, N, D]``, text ``[B, T, E]``, image_mask bool ``[B, N]``, text_mask bool ``[B, T]`` (True = takes part) ->
        (``[B, N, D]``, ``[B, T, E]``): what image and text have learnt of each other; residuals and norms are the caller's.

    Source: Li et al. 2022 (arXiv:2112.03857), equations 4 to 6; as in Liu et al. 2023 (arXiv:2303.05499).
    """

    def __init__(self, image_dim, text_dim, embed_dim, num_heads, *, bias=True, scale=None, backend=None, device=None, dtype=None):
        super().__init__()
        _check_heads(num_heads, embed_dim=embed_dim)
        self.image_dim, self.text_dim, self.embed_dim, self.num_heads = image_dim, text_dim, embed_dim, num_heads
        self.scale, self.backend = scale, backend
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.image_query_projection = nn.Linear(image_dim, embed_dim, **options)
        self.text_key_projection = nn.Linear(text_dim, embed_dim, **options)
        self.image_value_projection = nn.Linear(image_dim, embed_dim, **options)
        self.text_value_projection = nn.Linear(text_dim, embed_dim, **options)
        self.image_out_projection = nn.Linear(embed_dim, image_dim, **options)
        self.text_out_projection = nn.Linear(embed_dim, text_dim, **options)

    def forward(self, image, text, *, image_mask=None, text_mask=None):
        projected = (self.image_query_projection(image), self.text_key_projection(text),
                     self.image_value_projection(image), self.text_value_projection(text))
        image_out, text_out = functional.bidirectional_attention(
            *(_split_heads(t, self.num_heads) for t in projected), image_mask=image_mask, text_mask=text_mask, scale=self.scale,
            backend=self.backend)
        return self.image_out_projection(_join_heads(image_out)), self.text_out_projection(_join_heads(text_out))

    def extra_repr(self):
        return (f"image_dim={self.image_dim}, text_dim={self.text_dim}, embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
                f"backend={self.backend!r}")


class ChannelAttention(nn.Module):
    """Weighs the channels of every image position by image and text together: the article's ``softmax(W_a [X, Y])``, multiplied.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, size of the text vector.
        bias: whether the scores have one.
        backend: as in :func:`mmkernels.channel_attention`.

    Shape:
        image ``[B, N, D]`` or ``[B, D]``, text ``[B, E]`` -> like image.
    """

    def __init__(self, image_dim, text_dim, *, bias=True, backend=None, device=None, dtype=None):
        super().__init__()
        self.image_dim, self.text_dim, self.backend = image_dim, text_dim, backend
        self.score_projection = nn.Linear(image_dim + text_dim, image_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, image, text, *, need_weights=False):
        return functional.channel_attention(image, text, self.score_projection.weight, self.score_projection.bias,
                                            need_weights=need_weights, backend=self.backend)

    def extra_repr(self):
        return f"image_dim={self.image_dim}, text_dim={self.text_dim}, backend={self.backend!r}"


class AdditiveAttention(nn.Module):
    """Attention whose scores come from a small network: over image regions for a question (SAN, bottom-up-top-down), or over the
    patches of a slide without any query (attention-based multiple-instance learning, CLAM).

    Args:
        image_dim: D, channels of the image features.
        hidden_dim: A, size of the hidden vector.
        query_dim: E, size of the query; None: no query.
        num_queries: K, attention maps.
        activation: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        gated: whether a second projection gates the hidden vector by a sigmoid.
        combine: ``"pool"`` or ``"multiply"`` (one map only), as in :func:`mmkernels.additive_attention`.
        bias: whether the projections have one.
        backend: as in :func:`mmkernels.additive_attention`.

    Shape:
        image ``[B, N, D]`` (packed: ``[rows, D]`` with ``offsets``), query ``[B, E]`` -> ``[B, K, D]``, or like image (``"multiply"``).
    """

    def __init__(self, image_dim, hidden_dim, query_dim=None, num_queries=1, activation="tanh", gated=False, *, combine="pool", bias=True,
                 backend=None, device=None, dtype=None):
        super().__init__()
        self.image_dim, self.hidden_dim, self.query_dim, self.num_queries = image_dim, hidden_dim, query_dim, num_queries
        self.activation, self.gated, self.combine, self.backend = activation, gated, combine, backend
        options = {"device": device, "dtype": dtype}
        self.image_projection = nn.Linear(image_dim, hidden_dim, bias=bias, **options)
        self.query_projection = None if query_dim is None else nn.Linear(query_dim, hidden_dim, bias=False, **options)
        self.gate_projection = nn.Linear(image_dim, hidden_dim, bias=bias, **options) if gated else None
        self.score_projection = nn.Linear(hidden_dim, num_queries, bias=False, **options)     # a bias would cancel in the softmax

    def forward(self, image, query=None, *, mask=None, offsets=None, need_weights=False):
        gate = self.gate_projection
        return functional.additive_attention(
            image, query, self.image_projection.weight, None if self.query_projection is None else self.query_projection.weight,
            self.score_projection.weight, bias=self.image_projection.bias, w_gate=None if gate is None else gate.weight,
            bias_gate=None if gate is None else gate.bias, activation=self.activation, mask=mask, offsets=offsets, combine=self.combine,
            need_weights=need_weights, backend=self.backend)

    def extra_repr(self):
        return (f"image_dim={self.image_dim}, hidden_dim={self.hidden_dim}, query_dim={self.query_dim}, num_queries={self.num_queries}, "
                f"activation={self.activation!r}, gated={self.gated}, combine={self.combine!r}, backend={self.backend!r}")


def _check_heads(num_heads, **dims):
    for name, dim in dims.items():
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be at least 1 and divide {name} {dim}, got {num_heads}")


def _split_heads(tensor, num_heads):
    """[B, N, H * C] -> a view [B, H, N, C]"""
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join_heads(tensor):
    """[B, H, N, C] -> [B, N, H * C], a view of what the kernels give"""
    return tensor.transpose(1, 2).flatten(2)
