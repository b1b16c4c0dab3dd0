"""The operations as modules: they hold the projections that bring text to the image's channels.

The projections are submodules that are used as such: hooks on them, wrappers around them (LoRA), pruning,
parametrizations, quantisation and tensor parallelism take effect. Heads are split by their width, so that a rank that
holds a part of the channels holds whole heads.
"""

import torch
from torch import nn

from . import backends, checks, functional
from .ops.common import autocast
from .reference.additive_attention import ACTIVATIONS, combine_positions
from .reference.bags import Bags
from .reference.channel_attention import concatenate, multiply_channels
from .torch_private import FakeTensor, has_hooks


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

    def __init__(
        self,
        image_dim,
        text_dim,
        *,
        num_heads=1,
        combine="multiply",
        rescale=False,
        layout="bnd",
        scale=None,
        bias=True,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        backends.check(backend)
        checks.choice("combine", combine, ("multiply", "pool"))
        checks.choice("layout", layout, ("bnd", "bdhw"))
        self.image_dim = checks.dimension("image_dim", image_dim)
        self.text_dim = checks.dimension("text_dim", text_dim)
        self.num_heads = checks.heads("num_heads", num_heads, ("image_dim", self.image_dim))
        self.combine = combine
        self.rescale = checks.flag("rescale", rescale)
        self.layout = layout
        self.scale = None if scale is None else checks.number("scale", scale)
        self.backend = backend
        self.text_projection = nn.Linear(
            self.text_dim, self.image_dim, bias=checks.flag("bias", bias), device=device, dtype=dtype
        )

    def forward(self, image, text, *, mask=None, offsets=None, need_weights=False):
        _check_image(image, self.image_dim, offsets, self.layout)
        _check("text", text, ("B", None), ("E", None))
        return functional.spatial_attention(
            image,
            self.text_projection(text),
            mask=mask,
            offsets=offsets,
            scale=self.scale,
            num_heads=self.num_heads,
            combine=self.combine,
            rescale=self.rescale,
            layout=self.layout,
            need_weights=need_weights,
            backend=self.backend,
        )

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, "
            f"combine={self.combine!r}, rescale={self.rescale}, layout={self.layout!r}, backend={self.backend!r}"
        )


class GatedCrossAttention(nn.Module):
    """Image positions attend to text tokens, and the result multiplies the image's own features.

    ``out(gate * attention)``: query and gate are projections of the image, key and value of the text, the gate with an
    activation.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, channels of the text tokens.
        num_heads: H, divides ``embed_dim`` and ``value_dim``.
        embed_dim: channels of query and key, all heads together; default ``image_dim``.
        value_dim: channels of value and gate; default ``image_dim``.
        gate_activation: a module between the gate's projection and the multiplication, of every element by itself;
            default ``nn.ReLU()``; ``nn.Identity()`` for none.
        norm: a module for ``[B, N, value_dim]`` between attention and gate, e.g. ``nn.LayerNorm(value_dim)``. With one,
            as in LAVT's pixel-word attention (whose norm is over positions), the gate can't be fused: it is multiplied
            after the norm, by PyTorch. It needs all channels: under tensor parallelism of value and gate there can't be
            one.
        bias: whether the projections have one.
        scale, backend: as in :func:`mmkernels.gated_cross_attention`.

    Shape:
        image ``[B, N, D]``, text ``[B, T, E]``, mask bool ``[B, T]`` (True = a token, False = padding) or anything that
        :func:`mmkernels.gated_cross_attention` takes -> ``[B, N, D]``.

    Source: Yang et al. 2022 (arXiv:2112.02244), section 3.2.
    """

    def __init__(
        self,
        image_dim,
        text_dim,
        num_heads=1,
        *,
        embed_dim=None,
        value_dim=None,
        gate_activation=None,
        norm=None,
        bias=True,
        scale=None,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        backends.check(backend)
        image_dim = checks.dimension("image_dim", image_dim)
        text_dim = checks.dimension("text_dim", text_dim)
        embed_dim = image_dim if embed_dim is None else checks.dimension("embed_dim", embed_dim)
        value_dim = image_dim if value_dim is None else checks.dimension("value_dim", value_dim)
        num_heads = checks.heads("num_heads", num_heads, ("embed_dim", embed_dim), ("value_dim", value_dim))
        for name, module in (("gate_activation", gate_activation), ("norm", norm)):
            if module is not None and not callable(module):
                raise TypeError(f"{name} must be a module or None, got {type(module).__name__}")
        self.image_dim = image_dim
        self.text_dim = text_dim
        self.embed_dim = embed_dim
        self.value_dim = value_dim
        self.num_heads = num_heads
        self.backend = backend
        self.scale = None if scale is None else checks.number("scale", scale)
        options = {"bias": checks.flag("bias", bias), "device": device, "dtype": dtype}
        self.query_projection = nn.Linear(image_dim, embed_dim, **options)
        self.gate_projection = nn.Linear(image_dim, value_dim, **options)
        self.key_projection = nn.Linear(text_dim, embed_dim, **options)
        self.value_projection = nn.Linear(text_dim, value_dim, **options)
        self.gate_activation = nn.ReLU() if gate_activation is None else gate_activation
        self.norm = norm
        self.out_projection = nn.Linear(value_dim, image_dim, **options)

    def forward(self, image, text, *, mask=None, need_weights=False):
        _check("image", image, ("B", None), ("N", None), ("D", None))
        _check("text", text, ("B", image.shape[0]), ("T", None), ("E", None))
        width = self.embed_dim // self.num_heads
        value_width = self.value_dim // self.num_heads
        query = _split_heads("query_projection", self.query_projection(image), width)
        key = _split_heads("key_projection", self.key_projection(text), width)
        value = _split_heads("value_projection", self.value_projection(text), value_width)
        gate = self.gate_activation(self.gate_projection(image))
        found = functional.gated_cross_attention(
            query,
            key,
            value,
            _split_heads("gate_projection", gate, value_width) if self.norm is None else None,
            attn_mask=mask,
            scale=self.scale,
            need_weights=need_weights,
            backend=self.backend,
        )
        result, weights = found if need_weights else (found, None)
        result = _join_heads(result)
        if self.norm is not None:
            for name, part in (("value_projection", result), ("gate_projection", gate)):
                _check_channels(name, part, self.value_dim, "for norm")
            result = gate * self.norm(result)
        result = self.out_projection(result)
        return (result, weights) if need_weights else result

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, "
            f"backend={self.backend!r}"
        )


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
        image ``[B, N, D]``, text ``[B, T, E]``, image_mask bool ``[B, N]``, text_mask bool ``[B, T]`` (True = takes
        part) -> (``[B, N, D]``, ``[B, T, E]``): what image and text have learnt of each other; residuals and norms are
        the caller's.

    Source: Li et al. 2022 (arXiv:2112.03857), equations 4 to 6; as in Liu et al. 2023 (arXiv:2303.05499).
    """

    def __init__(
        self, image_dim, text_dim, embed_dim, num_heads, *, bias=True, scale=None, backend=None, device=None, dtype=None
    ):
        super().__init__()
        backends.check(backend)
        image_dim = checks.dimension("image_dim", image_dim)
        text_dim = checks.dimension("text_dim", text_dim)
        embed_dim = checks.dimension("embed_dim", embed_dim)
        num_heads = checks.heads("num_heads", num_heads, ("embed_dim", embed_dim))
        self.image_dim = image_dim
        self.text_dim = text_dim
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.scale = None if scale is None else checks.number("scale", scale)
        self.backend = backend
        options = {"bias": checks.flag("bias", bias), "device": device, "dtype": dtype}
        self.image_query_projection = nn.Linear(image_dim, embed_dim, **options)
        self.text_key_projection = nn.Linear(text_dim, embed_dim, **options)
        self.image_value_projection = nn.Linear(image_dim, embed_dim, **options)
        self.text_value_projection = nn.Linear(text_dim, embed_dim, **options)
        self.image_out_projection = nn.Linear(embed_dim, image_dim, **options)
        self.text_out_projection = nn.Linear(embed_dim, text_dim, **options)

    def forward(self, image, text, *, image_mask=None, text_mask=None):
        _check("image", image, ("B", None), ("N", None), ("D", None))
        _check("text", text, ("B", image.shape[0]), ("T", None), ("E", None))
        width = self.embed_dim // self.num_heads
        image_query = _split_heads("image_query_projection", self.image_query_projection(image), width)
        text_key = _split_heads("text_key_projection", self.text_key_projection(text), width)
        image_value = _split_heads("image_value_projection", self.image_value_projection(image), width)
        text_value = _split_heads("text_value_projection", self.text_value_projection(text), width)
        image_out, text_out = functional.bidirectional_attention(
            image_query,
            text_key,
            image_value,
            text_value,
            image_mask=image_mask,
            text_mask=text_mask,
            scale=self.scale,
            backend=self.backend,
        )
        return self.image_out_projection(_join_heads(image_out)), self.text_out_projection(_join_heads(text_out))

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, embed_dim={self.embed_dim}, "
            f"num_heads={self.num_heads}, "
            f"backend={self.backend!r}"
        )


class ChannelAttention(nn.Module):
    """Weighs the channels of every image position by image and text together.

    It is the article's ``softmax(W_a [X, Y])``, multiplied.

    A kernel reads the weight of ``score_projection`` where that is a plain ``nn.Linear``. Where it is anything else (it
    has hooks, is wrapped, pruned, parametrized, quantised or sharded) it is called, and plain PyTorch does the rest.

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
        backends.check(backend)
        self.image_dim = checks.dimension("image_dim", image_dim)
        self.text_dim = checks.dimension("text_dim", text_dim)
        self.backend = backend
        self.score_projection = nn.Linear(
            self.image_dim + self.text_dim, self.image_dim, bias=checks.flag("bias", bias), device=device, dtype=dtype
        )

    def forward(self, image, text, *, need_weights=False):
        checks.features("image", image)
        checks.shape("image", image, ("B", None), *((("N", None),) if image.dim() != 2 else ()), ("D", self.image_dim))
        if _may_be_read("channel_attention", self.backend, score_projection=self.score_projection):
            return functional.channel_attention(
                image,
                text,
                self.score_projection.weight,
                self.score_projection.bias,
                need_weights=need_weights,
                backend=self.backend,
            )
        need_weights = checks.flag("need_weights", need_weights)
        checks.features("text", text)
        image, text = autocast(image, text)
        checks.channel_text(image, text)
        scores = self.score_projection(concatenate(image, text))
        _check_channels("score_projection", scores, self.image_dim)
        result, weights = multiply_channels(image, scores)
        return (result, weights) if need_weights else result

    def extra_repr(self):
        return f"image_dim={self.image_dim}, text_dim={self.text_dim}, backend={self.backend!r}"


class AdditiveAttention(nn.Module):
    """Attention whose scores come from a small network.

    Over image regions for a question (SAN, bottom-up-top-down), or over the patches of a slide without any query
    (attention-based multiple-instance learning, CLAM).

    A kernel reads the weights of the projections where all are plain ``nn.Linear``. Where one is anything else (it has
    hooks, is wrapped, pruned, parametrized, quantised or sharded) they are called, and plain PyTorch does the rest: the
    hidden matrix exists then.

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
        image ``[B, N, D]`` (packed: ``[rows, D]`` with ``offsets``), query ``[B, E]`` -> ``[B, K, D]``, or like image
        (``"multiply"``).
    """

    def __init__(
        self,
        image_dim,
        hidden_dim,
        query_dim=None,
        num_queries=1,
        activation="tanh",
        gated=False,
        *,
        combine="pool",
        bias=True,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        backends.check(backend)
        checks.choice("activation", activation, tuple(ACTIVATIONS))
        checks.choice("combine", combine, ("pool", "multiply"))
        image_dim = checks.dimension("image_dim", image_dim)
        hidden_dim = checks.dimension("hidden_dim", hidden_dim)
        query_dim = None if query_dim is None else checks.dimension("query_dim", query_dim)
        num_queries = checks.dimension("num_queries", num_queries)
        if combine == "multiply" and num_queries != 1:
            raise ValueError(f"num_queries must be 1 with combine='multiply', got {num_queries}")
        bias = checks.flag("bias", bias)
        gated = checks.flag("gated", gated)
        self.image_dim = image_dim
        self.hidden_dim = hidden_dim
        self.query_dim = query_dim
        self.num_queries = num_queries
        self.activation = activation
        self.gated = gated
        self.combine = combine
        self.backend = backend
        options = {"device": device, "dtype": dtype}
        self.image_projection = nn.Linear(image_dim, hidden_dim, bias=bias, **options)
        self.query_projection = None if query_dim is None else nn.Linear(query_dim, hidden_dim, bias=False, **options)
        self.gate_projection = nn.Linear(image_dim, hidden_dim, bias=bias, **options) if gated else None
        self.score_projection = nn.Linear(
            hidden_dim, num_queries, bias=False, **options
        )  # a bias would cancel in the softmax

    def forward(self, image, query=None, *, mask=None, offsets=None, need_weights=False):
        _check_image(image, self.image_dim, offsets)
        if (query is None) != (self.query_projection is None):
            expected = "a torch.Tensor" if query is None else "None"
            raise ValueError(f"query must be {expected} with query_dim={self.query_dim}, got {type(query).__name__}")
        if not _may_be_read(
            "additive_attention",
            self.backend,
            image_projection=self.image_projection,
            query_projection=self.query_projection,
            gate_projection=self.gate_projection,
            score_projection=self.score_projection,
        ):
            need_weights = checks.flag("need_weights", need_weights)
            result, weights = self._call_projections(image, query, mask, offsets)
            return (result, weights) if need_weights else result
        gate = self.gate_projection
        return functional.additive_attention(
            image,
            query,
            self.image_projection.weight,
            None if self.query_projection is None else self.query_projection.weight,
            self.score_projection.weight,
            bias=self.image_projection.bias,
            w_gate=None if gate is None else gate.weight,
            bias_gate=None if gate is None else gate.bias,
            activation=self.activation,
            mask=mask,
            offsets=offsets,
            combine=self.combine,
            need_weights=need_weights,
            backend=self.backend,
        )

    def _call_projections(self, image, query, mask, offsets):
        """(result, weights), in plain PyTorch."""
        if query is not None:
            checks.features("query", query)
        image, query = autocast(image, query)
        if offsets is not None:
            offsets = checks.bag_offsets(offsets, image)
        batch, _, grid = checks.image_rows(image, offsets)
        if query is not None:
            checks.shape("query", query, ("B", batch), ("E", None))
        if mask is not None:
            checks.boolean_mask("mask", mask, "image", image, *grid)
            image = image.where(mask[..., None], 0)  # what is masked out may hold NaN
        bags = None if offsets is None else Bags.of(offsets, image.shape[0])
        hidden = self.image_projection(image)
        if query is not None:
            shift = self.query_projection(query)
            _check_channels("query_projection", shift, hidden.shape[-1], "like image_projection")
            hidden = hidden + (shift[:, None] if bags is None else bags.spread(shift))
        hidden = ACTIVATIONS[self.activation](hidden)
        if self.gate_projection is not None:
            gate = self.gate_projection(image)
            _check_channels("gate_projection", gate, hidden.shape[-1], "like image_projection")
            hidden = hidden * gate.sigmoid()
        scores = self.score_projection(hidden)
        _check_channels("score_projection", scores, self.num_queries)
        return combine_positions(image, scores, mask, bags, self.combine == "pool")

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, hidden_dim={self.hidden_dim}, query_dim={self.query_dim}, "
            f"num_queries={self.num_queries}, "
            f"activation={self.activation!r}, gated={self.gated}, combine={self.combine!r}, backend={self.backend!r}"
        )


def _check(name, tensor, *shape):
    checks.features(name, tensor)
    checks.shape(name, tensor, *shape)


def _check_image(image, channels, offsets, layout="bnd"):
    """All channels must be there: a rank's part of them would be taken for all heads."""
    if layout == "bdhw":
        _check("image", image, ("B", None), ("D", channels), ("Y", None), ("X", None))
    elif offsets is None:
        _check("image", image, ("B", None), ("N", None), ("D", channels))
    else:
        _check("image", image, ("rows", None), ("D", channels))


def _check_channels(name, tensor, channels, why=""):
    """A projection that is called may be anything; what it gives must not broadcast."""
    if tensor.shape[-1] != channels:
        raise ValueError(f"{name} must give {channels} channels{why and ' ' + why}, got {tensor.shape[-1]}")


PLAIN_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)


def _may_be_read(operation, backend, **projections):
    """Whether a kernel may read the projections' weights. If not they must be called, which a forced backend can't."""
    for name, projection in projections.items():
        if projection is None or _is_plain_linear(projection):
            continue
        if backend not in (None, "reference"):
            raise backends.BackendError(
                f"backend {backend!r} can't run {operation} where {name} isn't a plain nn.Linear without hooks "
                f"(it is {type(projection).__name__}): "
                "it has to be called, and plain PyTorch does the rest, with backend=None or 'reference'"
            )
        return False
    return True


def _is_plain_linear(module):
    """Nothing but a weight and a bias: nobody notices whether it is called or its weight is read."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and type(module._parameters.get("weight")) in PLAIN_TENSORS
        and "bias" in module._parameters
        and (module._parameters["bias"] is None or type(module._parameters["bias"]) in PLAIN_TENSORS)
        and not has_hooks(module)
    )


def _split_heads(name, tensor, width):
    """[B, N, H * width] -> a view [B, H, N, width]"""
    if tensor.shape[-1] % width:
        raise ValueError(f"{name} must give whole heads of {width} channels, got {tensor.shape[-1]}")
    return tensor.unflatten(-1, (tensor.shape[-1] // width, width)).transpose(1, 2)


def _join_heads(tensor):
    """[B, H, N, C] -> [B, N, H * C], a view of what the kernels give"""
    return tensor.transpose(1, 2).flatten(2)
