import functools
import math

import torch
from torch import nn

from .. import backends, checks, functional
from ..ops.common import accumulate_dtype
from ..ops.deformable_attention import flat_shapes
from ..torch_private import transforms_active
from .common import check_channels, check_features, check_input

__all__ = ["DeformableAttention"]


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query samples the image at a few places around its reference point.

    ``out(deformable_attention(value(image), reference point + offsets(query), scores(query)))``, with the parameters
    of Deformable DETR's layer, begun as there: the heads' first points lie in rings around the reference point, all
    with the same weight.

    Args:
        embed_dim: E, channels of queries, image and result.
        num_heads: H, divides ``embed_dim``.
        num_levels: L, resolutions of the image.
        num_points: P, points of each query, head and level; or a sequence, one number a level.
        bias: whether value and output projection have one. (Offsets begin as the bias of theirs, which is always
            there.)
        backend: as in :func:`mmkernels.deformable_attention`.

    Shape:
        query ``[B, Q, E]``; image ``[B, S, E]``, the levels one after the other, each row by row; reference_points
        ``[B, Q, L, 2]``, (x, y) from 0 to 1, or ``[B, Q, L, 4]``, boxes (x, y, width, height); spatial_shapes ``(Y,
        X)`` of each level, ``S = sum of Y X``; query_position like query or None, added to what offsets and scores are
        computed of; mask bool ``[B, S]`` (True = takes part) -> ``[B, Q, E]``.

    Source: Zhu et al. 2021, Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.4.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_levels,
        num_points,
        *,
        bias=True,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        backends.check(backend)
        self.embed_dim = checks.dimension("embed_dim", embed_dim)
        self.num_heads = checks.heads("num_heads", num_heads, ("embed_dim", self.embed_dim))
        self.num_levels = checks.dimension("num_levels", num_levels)
        if isinstance(num_points, (list, tuple)):
            if len(num_points) != self.num_levels:
                raise ValueError(f"num_points must have a number for each of {num_levels} levels, got {num_points}")
            self.num_points = tuple(checks.dimension(f"num_points[{i}]", n) for i, n in enumerate(num_points))
        else:
            self.num_points = (checks.dimension("num_points", num_points),) * self.num_levels
        self.backend = backend
        options = {"device": device, "dtype": dtype}
        points = self.num_heads * sum(self.num_points)
        self.offset_projection = nn.Linear(self.embed_dim, 2 * points, **options)
        self.score_projection = nn.Linear(self.embed_dim, points, **options)
        options["bias"] = checks.flag("bias", bias)
        self.value_projection = nn.Linear(self.embed_dim, self.embed_dim, **options)
        self.out_projection = nn.Linear(self.embed_dim, self.embed_dim, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        for projection in (self.value_projection, self.out_projection):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for projection in (self.offset_projection, self.score_projection):
            nn.init.zeros_(projection.weight)
        nn.init.zeros_(self.score_projection.bias)
        # Head h looks into direction 2 pi h / H, as far as a square reaches; its point number p is p + 1 steps away.
        angles = torch.arange(self.num_heads, dtype=torch.float64) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, n + 1, dtype=torch.float64) for n in self.num_points])
        offsets = direction[:, None] * steps[:, None]
        self.offset_projection.bias.copy_(offsets.flatten())

    def forward(self, query, image, reference_points, spatial_shapes, *, query_position=None, mask=None):
        check_features("image", image, ("B", None), ("S", None), ("E", None))
        batch = image.shape[0]
        check_features("query", query, ("B", batch), ("Q", None), ("E", None))
        queries = query.shape[1]
        checks.features("reference_points", reference_points)
        checks.shape(
            "reference_points",
            reference_points,
            ("B", batch),
            ("Q", queries),
            ("L", self.num_levels),
            ("2 or 4", 4 if reference_points.shape[-1:] == (4,) else 2),
        )
        if query_position is not None:
            check_features("query_position", query_position, *zip("BQE", query.shape))
            query = query + query_position
        check_input("image", image, value_projection=self.value_projection)
        check_input("query", query, score_projection=self.score_projection, offset_projection=self.offset_projection)
        points = sum(self.num_points)
        value = self.value_projection(image)
        scores = self.score_projection(query)
        offsets = self.offset_projection(query)
        check_channels("value_projection", value, self.embed_dim)
        check_channels("score_projection", scores, self.num_heads * points)
        check_channels("offset_projection", offsets, 2 * self.num_heads * points)
        shapes = flat_shapes(spatial_shapes)
        shapes = tuple(zip(shapes[::2], shapes[1::2]))
        if len(shapes) != self.num_levels:
            raise ValueError(f"spatial_shapes must have {self.num_levels} levels, got {len(shapes)}")
        attended = functional.deformable_attention(
            value.unflatten(2, (self.num_heads, -1)),
            shapes,
            self._locations(offsets.unflatten(2, (self.num_heads, points, 2)), reference_points, shapes),
            scores.unflatten(2, (self.num_heads, points)),
            points=self.num_points,
            mask=mask,
            backend=self.backend,
        )
        return self.out_projection(attended)

    def _locations(self, offsets, reference_points, shapes):
        """In float32 at least: a coordinate needs its bits. Offsets are in pixels of a level, or, of boxes, in
        halves of the box over the number of points."""
        of_points = lambda per_level: constant(
            tuple(each for each, count in zip(per_level, self.num_points) for _ in range(count)), offsets
        )
        levels = of_points(range(self.num_levels))
        offsets = offsets.to(accumulate_dtype(offsets))
        points = reference_points.to(offsets.dtype).index_select(2, levels)[:, :, None]
        if points.shape[-1] == 2:
            return points + offsets / of_points([(x, y) for y, x in shapes])
        return points[..., :2] + offsets / of_points([(n,) for n in self.num_points]) * (0.5 * points[..., 2:])

    def extra_repr(self):
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_levels={self.num_levels}, "
            f"num_points={self.num_points}, backend={self.backend!r}"
        )


def constant(numbers, like):
    """A tensor of nested tuples of ints on the device of `like`, made once; where a graph is traced, a part of that."""
    if checks.is_traced(like) or transforms_active():
        return torch.tensor(numbers, device=like.device)
    return _kept_constant(numbers, like.device)


@functools.lru_cache(256)
def _kept_constant(numbers, device):
    with torch.inference_mode(False):  # what is made there is of no use to autograd
        return torch.tensor(numbers, device=device)
