from torch import nn

from .. import backends, checks, functional
from .absorb import (
    absorb_bias,
    absorb_heads,
    absorb_result,
    absorbs,
    multiply_adds,
    project_pooled,
    scale_of,
    with_stand_in,
    without_hidden,
)
from .common import check_absorb, check_features, join_heads, project_heads, without_masked

__all__ = ["BidirectionalAttention"]


class BidirectionalAttention(nn.Module):
    """Image and text attend to each other, from one score matrix: the fusion layer of GLIP and Grounding DINO.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, channels of the text tokens.
        embed_dim: channels of queries, keys and values, all heads together.
        num_heads: H, divides ``embed_dim``.
        bias: whether the projections have one.
        scale, backend: as in :func:`mmkernels.bidirectional_attention`.
        absorb: whether the image's three projections are absorbed (:func:`mmkernels.absorbed_attention`), with the same
            results; None: where that takes fewer operations (:func:`mmkernels.absorb_pays`) and all are plain
            ``nn.Linear``s, without hooks, wrappers, parametrizations, quantisation or sharding. True where they aren't
            is an error.

    Shape:
        image ``[B, N, D]``, text ``[B, T, E]``, image_mask bool ``[B, N]``, text_mask bool ``[B, T]`` (True = takes
        part) -> (``[B, N, D]``, ``[B, T, E]``): what image and text have learnt of each other; residuals and norms are
        the caller's. The masks say what the other side may attend to: a masked token, too, gets its row of the result.
        With nothing to attend to a row is the output projection's bias. NaN or Inf that is masked out counts as 0.

    Source: Li et al. 2022 (arXiv:2112.03857), equations 4 to 6; as in Liu et al. 2023 (arXiv:2303.05499).
    """

    def __init__(
        self,
        image_dim,
        text_dim,
        embed_dim,
        num_heads,
        *,
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
        embed_dim = checks.dimension("embed_dim", embed_dim)
        num_heads = checks.heads("num_heads", num_heads, ("embed_dim", embed_dim))
        self.image_dim = image_dim
        self.text_dim = text_dim
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.scale = None if scale is None else checks.number("scale", scale)
        self.absorb = check_absorb(absorb)
        self.backend = backend
        options = {"bias": checks.flag("bias", bias), "device": device, "dtype": dtype}
        self.image_query_projection = nn.Linear(image_dim, embed_dim, **options)
        self.text_key_projection = nn.Linear(text_dim, embed_dim, **options)
        self.image_value_projection = nn.Linear(image_dim, embed_dim, **options)
        self.text_value_projection = nn.Linear(text_dim, embed_dim, **options)
        self.image_out_projection = nn.Linear(embed_dim, image_dim, **options)
        self.text_out_projection = nn.Linear(embed_dim, text_dim, **options)

    def forward(self, image, text, *, image_mask=None, text_mask=None):
        check_features("image", image, ("B", None), ("N", None), ("D", None))
        check_features("text", text, ("B", image.shape[0]), ("T", None), ("E", None))
        for name, mask, size in (
            ("image_mask", image_mask, ("N", image.shape[1])),
            ("text_mask", text_mask, ("T", text.shape[1])),
        ):
            if mask is not None:
                checks.boolean_mask(name, mask, "image", image, ("B", image.shape[0]), size)
        text = without_masked(text, text_mask)
        width = self.embed_dim // self.num_heads
        text_key = project_heads(self, "text_key_projection", "text", text, width)
        text_value = project_heads(self, "text_value_projection", "text", text, width)
        attend = self._absorbed if self._absorbs(image, text_key, text_value) else self._projected
        image_out, text_out = attend(image, text_key, text_value, image_mask, text_mask)
        return image_out, self.text_out_projection(join_heads(text_out))

    def _projected(self, image, text_key, text_value, image_mask, text_mask):
        width = text_key.shape[3]
        image = without_masked(image, image_mask)
        image_query = project_heads(self, "image_query_projection", "image", image, width)
        image_value = project_heads(self, "image_value_projection", "image", image, width)
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
        return self.image_out_projection(join_heads(image_out)), text_out

    def _absorbs(self, image, text_key, text_value):
        _, positions, channels = image.shape
        _, heads, tokens, width = text_key.shape
        embed = heads * width
        return text_key.shape == text_value.shape and absorbs(
            self,
            image,
            text_key,
            multiply_adds(positions, tokens, channels, embed, heads, channels, True),
            image_query_projection=(self.image_query_projection, (embed, channels)),
            image_value_projection=(self.image_value_projection, (embed, channels)),
            image_out_projection=(self.image_out_projection, (None, embed)),
        )

    def _absorbed(self, image, text_key, text_value, image_mask, text_mask):
        width = text_key.shape[3]
        scale = scale_of(self.scale, width)
        query, out, value = self.image_query_projection, self.image_out_projection, self.image_value_projection
        text_key, text_value = without_hidden(text_key, text_value, text_mask)
        image_out, pooled = functional.absorbed_attention(
            image,
            absorb_heads(text_key, query.weight, scale),
            absorb_result(text_value, out.weight, out.bias),
            key_bias=absorb_bias(text_key, query.bias, scale),
            image_mask=image_mask,
            text_mask=text_mask if text_mask is None or out.bias is None else with_stand_in(text_mask),
            backend=self.backend,
        )
        return image_out, project_pooled(pooled, value.weight, value.bias, width, image_mask)

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, embed_dim={self.embed_dim}, "
            f"num_heads={self.num_heads}, "
            f"absorb={self.absorb}, backend={self.backend!r}"
        )
