from torch import nn

from .. import backends, checks, functional
from .common import check_features, join_heads, split_heads

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
        check_features("image", image, ("B", None), ("N", None), ("D", None))
        check_features("text", text, ("B", image.shape[0]), ("T", None), ("E", None))
        width = self.embed_dim // self.num_heads
        image_query = split_heads("image_query_projection", self.image_query_projection(image), width)
        text_key = split_heads("text_key_projection", self.text_key_projection(text), width)
        image_value = split_heads("image_value_projection", self.image_value_projection(image), width)
        text_value = split_heads("text_value_projection", self.text_value_projection(text), width)
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
        return self.image_out_projection(join_heads(image_out)), self.text_out_projection(join_heads(text_out))

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, text_dim={self.text_dim}, embed_dim={self.embed_dim}, "
            f"num_heads={self.num_heads}, "
            f"backend={self.backend!r}"
        )
