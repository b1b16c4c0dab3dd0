"""LAVT's fusion of language into an image encoder: pixel-word attention, and the gate that lets it in."""

from torch import nn

from .. import backends, checks, functional
from ..modules.common import check_features, join_heads, split_heads
from .common import where_taking_part


class PixelWordAttention(nn.Module):
    """Every pixel gathers what the sentence's words say to it, and multiplies its own features by that.

    ::

        attended = attention(norm(query(image)), key(text), value(text))
        result   = gelu(W (gelu(V image) * norm(out(attended))))

    Both norms are over the positions, channel by channel (instance norm), so that the multiplication can't be part of
    the kernel. The attention is one call of :func:`mmkernels.gated_cross_attention`: no ``N x T`` scores are written.
    With one head ``out`` is applied to the words' values instead, T rows in place of N, with the same results: weights
    sum to 1, and where no word takes part the norm makes 0 of anything.

    Args:
        image_dim: D, channels of the image features.
        text_dim: E, channels of the words.
        num_heads: H, divides ``image_dim``.
        dropout: of both projections that end in a GELU, in training.
        backend: as in :func:`mmkernels.gated_cross_attention`.

    Shape:
        image ``[B, N, D]`` (N at least 2 in training: the norms'), text ``[B, T, E]``, mask bool ``[B, T]`` (True = a
        word, False = padding, which reaches nothing) -> ``[B, N, D]``.

    Source: Yang et al. 2022, LAVT (arXiv:2112.02244), section 3.2, with what its published code has beyond that: GELU
    for ReLU, heads, and a scale of ``D ** -0.5`` for any number of heads.
    """

    def __init__(self, image_dim, text_dim, num_heads=1, *, dropout=0.0, backend=None, device=None, dtype=None):
        super().__init__()
        backends.check(backend)
        self.image_dim = checks.dimension("image_dim", image_dim)
        self.text_dim = checks.dimension("text_dim", text_dim)
        self.num_heads = checks.heads("num_heads", num_heads, ("image_dim", self.image_dim))
        self.backend = backend
        options = {"device": device, "dtype": dtype}
        self.image_projection = nn.Linear(self.image_dim, self.image_dim, **options)
        self.query_projection = nn.Linear(self.image_dim, self.image_dim, **options)
        self.key_projection = nn.Linear(self.text_dim, self.image_dim, **options)
        self.value_projection = nn.Linear(self.text_dim, self.image_dim, **options)
        self.out_projection = nn.Linear(self.image_dim, self.image_dim, **options)
        self.result_projection = nn.Linear(self.image_dim, self.image_dim, **options)
        self.query_norm = nn.InstanceNorm1d(self.image_dim)
        self.out_norm = nn.InstanceNorm1d(self.image_dim)
        self.activation = nn.Sequential(nn.GELU(), nn.Dropout(dropout))

    def forward(self, image, text, *, mask=None):
        check_features("image", image, ("B", None), ("N", None), ("D", self.image_dim))
        check_features("text", text, ("B", image.shape[0]), ("T", None), ("E", self.text_dim))
        text = where_taking_part("text", text, mask)
        query = self.query_norm(self.query_projection(image).mT).mT
        value = self.value_projection(text)
        if self.num_heads == 1:
            value = self.out_projection(value)
        width = self.image_dim // self.num_heads
        attended = functional.gated_cross_attention(
            split_heads("query_projection", query, width),
            split_heads("key_projection", self.key_projection(text), width),
            split_heads("value_projection", value, width),
            attn_mask=mask,
            scale=self.image_dim**-0.5,
            backend=self.backend,
        )
        attended = join_heads(attended)
        if self.num_heads > 1:
            attended = self.out_projection(attended)
        words = self.out_norm(attended.mT).mT
        return self.activation(self.result_projection(self.activation(self.image_projection(image)) * words))


class LanguageGate(nn.Module):
    """Lets in of the fused features what a gate made of themselves lets: ``image + tanh(W relu(V fused)) * fused``.

    Args:
        image_dim: D, channels of both.

    Shape:
        image ``[B, N, D]``, fused like image, as :class:`PixelWordAttention` gives it -> like image.

    Source: Yang et al. 2022, LAVT (arXiv:2112.02244), section 3.3.
    """

    def __init__(self, image_dim, *, device=None, dtype=None):
        super().__init__()
        image_dim = checks.dimension("image_dim", image_dim)
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate = nn.Sequential(
            nn.Linear(image_dim, image_dim, **options),
            nn.ReLU(),
            nn.Linear(image_dim, image_dim, **options),
            nn.Tanh(),
        )

    def forward(self, image, fused):
        checks.features("image", image)
        check_features("fused", fused, *zip("BND", image.shape))
        return image + self.gate(fused) * fused
