from torch import nn

from .. import backends, checks, functional
from .common import check_features, check_image, check_input

__all__ = ["SpatialAttention"]


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
        check_image(image, self.image_dim, offsets, self.layout)
        check_features("text", text, ("B", None), ("E", None))
        check_input("text", text, text_projection=self.text_projection)
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
