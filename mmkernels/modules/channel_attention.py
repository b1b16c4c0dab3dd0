from torch import nn

from .. import backends, checks, functional
from ..ops.common import autocast
from ..reference.channel_attention import concatenate, multiply_channels
from .common import check_channels, may_be_read

__all__ = ["ChannelAttention"]


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
        if may_be_read("channel_attention", self.backend, score_projection=self.score_projection):
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
        check_channels("score_projection", scores, self.image_dim)
        result, weights = multiply_channels(image, scores)
        return (result, weights) if need_weights else result

    def extra_repr(self):
        return f"image_dim={self.image_dim}, text_dim={self.text_dim}, backend={self.backend!r}"
