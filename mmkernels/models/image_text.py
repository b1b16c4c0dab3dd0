"""The article's model: a small CNN looks, an LSTM reads, spatial attention brings them together."""

import torch
from torch import nn
from torch.nn import functional as F

from .. import checks, tasks
from ..modules import SpatialAttention

PAD = 0


class ImageTextModel(nn.Module):
    """Tells whether a text describes an image.

    ::

        image [B, 3, 224, 224] -> Conv 32 3x3, relu, MaxPool 2 -> Conv 64 3x3, relu, MaxPool 2 -> [B, 64, 54, 54]
        text  [B, T]           -> Embedding(10000, 128) -> LSTM(128), its last state -> Linear -> [B, 64]
        both                   -> softmax over positions of <image_n, text>, multiply, mean    -> [B, 64]
                               -> Linear(1), a logit

    As printed, the article's code can't run: it takes the Dot of 64 image channels with 128 text channels, and puts a
    Dense layer on a 4-D tensor. So here the text is projected to the image's channels, every position gets a score, and
    the positions are pooled before the prediction.

    The weights are rescaled to a mean of 1, then multiplied with the image, then averaged over positions. That mean is
    the weighted sum, so ``combine="pool"`` computes it in one pass without ever writing the weighted image;
    ``combine="multiply"`` takes the article's two steps and gives the same numbers.

    Args:
        vocabulary: number of token ids; id 0 is padding.
        channels: of the two convolutions; the last is the attention's D.
        embedding, hidden: sizes of the token embedding and of the LSTM's state.
        num_heads: of the attention; each has a softmax of its own over its share of the channels. More learn faster.
        combine: ``"pool"`` or ``"multiply"``, see above.
        backend: as in :func:`mmkernels.spatial_attention`. None is the fused layer, ``"reference"`` the plain one.
            The parameters don't depend on it: the same seed gives the same model.

    Shape:
        image: float ``[B, 3, Y, X]``, Y and X at least 10 (any memory format; channels_last is the fastest on CPUs).
        text: int64 ``[B, T]``, or ``[B, K, T]`` for K texts an image: the image is then looked at only once. Padding
            (id 0) is skipped wherever it stands and never changes a result. T may be 0; an empty text is the LSTM's
            initial state, a zero vector.
        result: logits ``[B]`` or ``[B, K]``; their sigmoid is the probability that the text describes the image. With
            a `target` like them, ``(loss, logits)``, the loss weighted as :meth:`mmkernels.tasks.Task.loss` says.

    Raises:
        TypeError, ValueError: image or text has a wrong type or shape; the message names it.

    Source: the attention is that of Bahdanau et al. 2015 (arXiv:1409.0473), over positions as in Xu et al. 2015
    (arXiv:1502.03044).
    """

    def __init__(
        self,
        vocabulary=10_000,
        *,
        channels=(32, 64),
        embedding=128,
        hidden=128,
        num_heads=1,
        combine="pool",
        backend=None,
    ):
        super().__init__()
        checks.choice("combine", combine, ("multiply", "pool"))
        self.task = tasks.get("binary")
        # The largest of four is pooled first: relu then works on a quarter of the elements, with the same results and
        # gradients to the bit, since it keeps the order.
        self.image_encoder = nn.Sequential(
            nn.Conv2d(3, channels[0], 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(channels[0], channels[1], 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
        )
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        # A multiplied image needs weights of mean 1 to be averaged; a pooled one is their weighted sum as it is.
        self.fusion = SpatialAttention(
            channels[1],
            hidden,
            num_heads=num_heads,
            layout="bdhw",
            combine=combine,
            rescale=combine == "multiply",
            backend=backend,
        )
        self.classifier = nn.Linear(channels[1], 1)

    def forward(self, image, text, *, target=None, positive_weight=None):
        fused = self._each_text(image, text, lambda features, vector: self._pooled(self.fusion(features, vector)))
        logits = self.classifier(fused).squeeze(-1)
        return logits if target is None else (self.task.loss(logits, target, positive_weight), logits)

    @torch.no_grad()
    def predict(self, image, text):
        """The probability that the text describes the image, float ``[B]`` or ``[B, K]``."""
        return self(image, text).sigmoid()

    @torch.no_grad()
    def attention(self, image, text):
        """Where the text looks: weights that sum to 1 (their mean over heads), float ``[B, 54, 54]`` (``[B, K, 54,
        54]``) for 224 x 224."""

        def weights(features, vector):
            found = self.fusion(features, vector, need_weights=True)[1].mean(1)
            found = found.unflatten(-1, features.shape[2:])
            return found / features[0, 0].numel() if self.fusion.rescale else found

        return self._each_text(image, text, weights)

    def encode_text(self, text):
        """Token ids ``[B, T]`` -> ``[B, hidden]``, the LSTM's state after the last token that isn't padding."""
        padding = text == PAD
        text = text.gather(1, padding.int().argsort(stable=True, dim=1))  # tokens first, in their order
        lengths = (~padding).sum(1)
        longest = max(1, int(lengths.max())) if len(lengths) else 1  # trailing padding costs nothing
        text = F.pad(text[:, :longest], (0, longest - min(longest, text.shape[1])), value=PAD)
        states, _ = self.lstm(self.embedding(text))
        states = F.pad(states, (0, 0, 1, 0))  # before the first token: the initial state
        return states[torch.arange(len(text), device=text.device), lengths]

    def _each_text(self, image, text, fuse):
        _check(image, text)
        features = self.image_encoder(image)
        if text.dim() == 2:
            return fuse(features, self.encode_text(text))
        vectors = self.encode_text(text.flatten(0, 1)).unflatten(0, text.shape[:2])
        return torch.stack([fuse(features, vector) for vector in vectors.unbind(1)], 1)

    def _pooled(self, fused):
        return fused if self.fusion.combine == "pool" else fused.mean((2, 3))


def _check(image, text):
    checks.is_tensor("image", image)
    checks.is_tensor("text", text)
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 10:
        raise ValueError(f"image must be [B, 3, Y, X] with Y and X at least 10, got {list(image.shape)}")
    if text.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"text must hold token ids (int64), got {text.dtype}")
    if text.dim() not in (2, 3) or text.shape[0] != image.shape[0] or (text.dim() == 3 and not text.shape[1]):
        raise ValueError(f"text must be [B, T] or [B, K, T] with B = {image.shape[0]}, got {list(text.shape)}")
