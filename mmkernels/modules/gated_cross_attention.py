from torch import nn

from .. import backends, checks, functional
from .common import check_channels, check_features, join_heads, split_heads

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
        check_features("image", image, ("B", None), ("N", None), ("D", None))
        check_features("text", text, ("B", image.shape[0]), ("T", None), ("E", None))
        width = self.embed_dim // self.num_heads
        value_width = self.value_dim // self.num_heads
        query = split_heads("query_projection", self.query_projection(image), width)
        key = split_heads("key_projection", self.key_projection(text), width)
        value = split_heads("value_projection", self.value_projection(text), value_width)
        gate = self.gate_activation(self.gate_projection(image))
        found = functional.gated_cross_attention(
            query,
            key,
            value,
            split_heads("gate_projection", gate, value_width) if self.norm is None else None,
            attn_mask=mask,
            scale=self.scale,
            need_weights=need_weights,
            backend=self.backend,
        )
        result, weights = found if need_weights else (found, None)
        result = join_heads(result)
        if self.norm is not None:
            for name, part in (("value_projection", result), ("gate_projection", gate)):
                check_channels(name, part, self.value_dim, "for norm")
            result = gate * self.norm(result)
        result = self.out_projection(result)
        return (result, weights) if need_weights else result

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, num_heads={self.num_heads}, "
            f"backend={self.backend!r}"
        )
