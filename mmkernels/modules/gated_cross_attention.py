import torch
from torch import nn

from .. import backends, checks, functional
from ..ops.common import cast
from .absorb import absorb_bias, absorb_heads, absorbs, multiply_adds, scale_of, side_by_side, without_hidden
from .common import (
    check_absorb,
    check_channels,
    check_features,
    check_input,
    join_heads,
    project_heads,
    split_heads,
    without_masked,
)

__all__ = ["GatedCrossAttention"]


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
        absorb: whether the image's query projection is absorbed (:func:`mmkernels.absorbed_attention`), with the same
            results; None: where that takes fewer operations and it is a plain ``nn.Linear``, without hooks, wrappers,
            parametrizations, quantisation or sharding, with ``mask`` None or bool ``[B, T]``, without weights. True
            elsewhere is an error. What a gate follows can't be absorbed; several heads' results have to stay apart for
            it, so that this pays for one head, or few tokens.

    Shape:
        image ``[B, N, D]``, text ``[B, T, E]``, mask bool ``[B, T]`` (True = a token, False = padding) or anything that
        :func:`mmkernels.gated_cross_attention` takes -> ``[B, N, D]``. Without any token to attend to it is the output
        projection's bias (but for a norm); NaN or Inf of padding reaches no result and no gradient.

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
        absorb=None,
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
        self.absorb = check_absorb(absorb)
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
        check_features("image", image, ("B", None), ("N", None), ("D", None))
        check_features("text", text, ("B", image.shape[0]), ("T", None), ("E", None))
        text = without_masked(text, _token_mask(mask, text))
        key = project_heads(self, "key_projection", "text", text, self.embed_dim // self.num_heads)
        value = project_heads(self, "value_projection", "text", text, self.value_dim // self.num_heads)
        if mask is not None:
            batch, heads, tokens, _ = key.shape
            checks.attention_mask("mask", mask, "image", image, batch, heads, image.shape[1], tokens)
        check_input("image", image, gate_projection=self.gate_projection)
        gate = self.gate_activation(self.gate_projection(image))
        if absorbed := self._absorbs(image, key, value, mask, need_weights):
            result, weights = self._absorbed(image, key, value, mask), None
        else:
            result, weights = self._projected(image, key, value, gate, mask, need_weights)
        if self.norm is not None:
            for name, part in (("value_projection", result), ("gate_projection", gate)):
                check_channels(name, part, self.value_dim, "for norm")
            result = gate * self.norm(result)
        elif absorbed:
            check_channels("gate_projection", gate, result.shape[-1], "like value_projection")
            result = gate * result
        result = self.out_projection(result)
        return (result, weights) if need_weights else result

    def _projected(self, image, key, value, gate, mask, need_weights):
        """The gate is fused, unless the norm is before it."""
        found = functional.gated_cross_attention(
            project_heads(self, "query_projection", "image", image, key.shape[3]),
            key,
            value,
            split_heads("gate_projection", gate, value.shape[3]) if self.norm is None else None,
            attn_mask=mask,
            scale=self.scale,
            need_weights=need_weights,
            backend=self.backend,
        )
        result, weights = found if need_weights else (found, None)
        return join_heads(result), weights

    def _absorbs(self, image, key, value, mask, need_weights):
        batch, heads, tokens, width = key.shape
        if need_weights or (mask is not None and _token_mask(mask, key[:, 0]) is None):
            if not check_absorb(self.absorb):
                return False
            if checks.flag("need_weights", need_weights):
                raise ValueError("need_weights must be False with absorb=True, got True")
            raise ValueError(
                f"mask must be None or bool [B, T] = {[batch, tokens]} with absorb=True, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        _, positions, channels = image.shape
        projected, absorbed = multiply_adds(positions, tokens, channels, heads * width, heads, None, False)
        products = positions * tokens * heads * value.shape[3]
        return key.shape[:3] == value.shape[:3] and absorbs(
            self,
            image,
            key,
            (projected + products, absorbed + products * heads),
            query_projection=(self.query_projection, (heads * width, channels)),
        )

    def _absorbed(self, image, key, value, mask):
        """The image's results of all heads add up there: each head's values stand in channels of their own."""
        key, value = without_hidden(key, value, mask)
        scale = scale_of(self.scale, key.shape[3])
        weight, bias = self.query_projection.weight, self.query_projection.bias
        absorbed_key = absorb_heads(key, weight, scale)
        result, _ = functional.absorbed_attention(
            image,
            absorbed_key,
            side_by_side(cast(value, absorbed_key.dtype)),
            key_bias=absorb_bias(key, bias, scale),
            text_mask=mask,
            pool=False,
            backend=self.backend,
        )
        return result

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, "
            f"absorb={self.absorb}, backend={self.backend!r}"
        )


def _token_mask(mask, tokens):
    """`mask`, where it is one of these ``[B, T, C]``, neither of pairs nor added; and not a mistake, which is told
    elsewhere."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.device != tokens.device:
        return None
    return mask if mask.shape == tokens.shape[:2] else None
