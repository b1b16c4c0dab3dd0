import torch
from torch import nn

from .. import backends, checks, functional
from .absorb import absorbed_pooling, absorbs, multiply_adds, scale_of
from .common import check_absorb, check_features, join_heads, project_heads, without_masked

__all__ = ["AttentionPooling"]


class AttentionPooling(nn.Module):
    """A few queries, learned or given, attend to the image: pooling heads, Q-Former's cross-attention, resamplers.

    ``out(attention(query, key(image), value(image)))``, as ``nn.MultiheadAttention`` has it. With few queries nearly
    all operations are the image's two projections: absorbed (:func:`mmkernels.absorbed_attention`) they vanish, and the
    image is read once as it is.

    Args:
        image_dim: D, channels of the image features.
        num_heads: H, divides ``embed_dim``.
        num_queries: T, the number of learned queries (``query``, a parameter ``[T, D]``). Leave it where they are
            given: they may be any number.
        query_dim: channels of queries that each call gives; None: they are learned.
        out_dim: channels of the result; default ``image_dim``.
        embed_dim: channels of queries, keys and values, all heads together; default ``image_dim``.
        bias: whether the projections have one.
        scale: of the scores; default ``(embed_dim / num_heads) ** -0.5``.
        absorb: whether key and value projections of the image are absorbed, with the same results; None: where that
            takes fewer operations (:func:`mmkernels.absorb_pays`) and both are plain ``nn.Linear``s, without hooks,
            wrappers, parametrizations, quantisation or sharding. True where they aren't is an error.
        backend: as in :func:`mmkernels.absorbed_attention`.

    Shape:
        image ``[B, N, D]``, query ``[B, T, query_dim]`` or None where they are learned, image_mask bool ``[B, N]``
        (True = takes part) -> ``[B, T, out_dim]``. Of a sample without any position that takes part it is the output
        projection's bias; NaN or Inf of positions that don't reaches no result and no gradient.

    Weights of an ``nn.MultiheadAttention`` (SigLIP's head has one): its ``in_proj_weight`` and ``in_proj_bias`` hold
    those of ``query_projection``, ``key_projection`` and ``value_projection``, one above the other; ``out_proj`` is
    ``out_projection``. A learned query is projected, too, as there.

    Source: Lee et al. 2019 (arXiv:1810.00825), section 3.2; as in SigLIP (arXiv:2303.15343), CLIP's attention pooling
    (arXiv:2103.00020: the mean is the query), Q-Former (arXiv:2301.12597), Perceiver (arXiv:2103.03206).
    """

    def __init__(
        self,
        image_dim,
        num_heads,
        num_queries=1,
        query_dim=None,
        out_dim=None,
        *,
        embed_dim=None,
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
        num_queries = checks.dimension("num_queries", num_queries)
        query_dim = None if query_dim is None else checks.dimension("query_dim", query_dim)
        out_dim = image_dim if out_dim is None else checks.dimension("out_dim", out_dim)
        embed_dim = image_dim if embed_dim is None else checks.dimension("embed_dim", embed_dim)
        if query_dim is not None and num_queries != 1:
            raise ValueError(f"num_queries must be 1 with query_dim={query_dim}: they are given, got {num_queries}")
        self.image_dim = image_dim
        self.num_heads = checks.heads("num_heads", num_heads, ("embed_dim", embed_dim))
        self.num_queries = num_queries
        self.query_dim = query_dim
        self.out_dim = out_dim
        self.embed_dim = embed_dim
        self.scale = None if scale is None else checks.number("scale", scale)
        self.absorb = check_absorb(absorb)
        self.backend = backend
        options = {"device": device, "dtype": dtype}
        self.query = nn.Parameter(torch.empty(num_queries, image_dim, **options)) if query_dim is None else None
        options["bias"] = checks.flag("bias", bias)
        self.query_projection = nn.Linear(image_dim if query_dim is None else query_dim, embed_dim, **options)
        self.key_projection = nn.Linear(image_dim, embed_dim, **options)
        self.value_projection = nn.Linear(image_dim, embed_dim, **options)
        self.out_projection = nn.Linear(embed_dim, out_dim, **options)
        self.reset_parameters()

    def reset_parameters(self):
        """Of the learned queries; the projections have their own."""
        if self.query is not None:
            nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, image, query=None, *, image_mask=None):
        check_features("image", image, ("B", None), ("N", None), ("D", None))
        if (query is None) != (self.query is not None):
            expected = "a torch.Tensor" if query is None else "None"
            raise ValueError(f"query must be {expected} with query_dim={self.query_dim}, got {type(query).__name__}")
        if query is not None:
            check_features("query", query, ("B", image.shape[0]), ("T", None), ("E", None))
        if image_mask is not None:
            checks.boolean_mask("image_mask", image_mask, "image", image, ("B", image.shape[0]), ("N", image.shape[1]))
        width = self.embed_dim // self.num_heads
        query = self.query[None] if query is None else query
        query = project_heads(self, "query_projection", "query", query, width)
        attend = self._absorbed if self._absorbs(image, query) else self._projected
        return self.out_projection(join_heads(attend(image, query, image_mask)))

    def _projected(self, image, query, image_mask):
        width = query.shape[3]
        image = without_masked(image, image_mask)
        return functional.gated_cross_attention(
            query.expand(image.shape[0], -1, -1, -1),
            project_heads(self, "key_projection", "image", image, width),
            project_heads(self, "value_projection", "image", image, width),
            attn_mask=image_mask,
            scale=self.scale,
            backend=self.backend,
        )

    def _absorbs(self, image, query):
        _, heads, tokens, width = query.shape
        weight = heads * width, image.shape[2]
        return absorbs(
            self,
            image,
            query,
            multiply_adds(image.shape[1], tokens, image.shape[2], heads * width, heads, None, True),
            key_projection=(self.key_projection, weight),
            value_projection=(self.value_projection, weight),
        )

    def _absorbed(self, image, query, image_mask):
        return absorbed_pooling(
            image,
            query,
            self.key_projection.weight,
            self.value_projection.weight,
            self.value_projection.bias,
            scale_of(self.scale, query.shape[3]),
            image_mask=image_mask,
            key_bias=self.key_projection.bias,
            backend=self.backend,
        )

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, num_heads={self.num_heads}, num_queries={self.num_queries}, "
            f"query_dim={self.query_dim}, out_dim={self.out_dim}, "
            f"absorb={self.absorb}, backend={self.backend!r}"
        )
