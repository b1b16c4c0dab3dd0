"""Bottom-up and top-down attention: a decoder that looks at the image's regions at every word."""

import torch
from torch import nn

from .. import backends, checks, functional
from ..modules.common import check_features
from .common import where_taking_part


class TopDownCaptioner(nn.Module):
    """Writes a caption of an image that is given as regions; every word's state chooses among them.

    ::

        h1 = LSTM1([h2, mean of the regions, embedding of the word before])
        seen = sum_n softmax_n(w . tanh(W_v image_n + W_h h1)) image_n
        h2 = LSTM2([seen, h1]),  logits of the next word = W_p h2 + b_p

    The image's projection ``W_v image`` is made once for all words. A call of :func:`mmkernels.additive_attention` a
    word would make it every time: 37 times as long for 36 regions of 2048 channels. So the scores are plain PyTorch,
    and mask, softmax and sum one call of :func:`mmkernels.gated_cross_attention`: one query a sample, 1, whose keys
    are the scores. With so few regions that is as fast as plain PyTorch, no faster; what it gives is the mask.

    Args:
        vocabulary: number of words.
        image_dim: D, channels of a region.
        embedding, hidden: sizes of a word's vector and of both LSTMs' states.
        attention: A, size of the attention's hidden vector.
        backend: as in :func:`mmkernels.gated_cross_attention`.

    Shape:
        image ``[B, N, D]``, text int64 ``[B, T]``, the words before each that is predicted (the first starts the
        caption), mask bool ``[B, N]`` (True = a region, False = padding, which reaches nothing) -> logits
        ``[B, T, vocabulary]``; with ``need_weights`` also where each word looked, ``[B, T, N]``.

    Source: Anderson et al. 2018 (arXiv:1707.07998), section 3.2.
    """

    def __init__(
        self,
        vocabulary,
        image_dim=2048,
        *,
        embedding=1000,
        hidden=1000,
        attention=512,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        backends.check(backend)
        self.backend = backend
        vocabulary = checks.dimension("vocabulary", vocabulary)
        self.image_dim = checks.dimension("image_dim", image_dim)
        embedding = checks.dimension("embedding", embedding)
        self.hidden = checks.dimension("hidden", hidden)
        options = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocabulary, embedding, **options)
        self.attention_lstm = nn.LSTMCell(self.hidden + self.image_dim + embedding, self.hidden, **options)
        attention = checks.dimension("attention", attention)
        self.image_projection = nn.Linear(self.image_dim, attention, bias=False, **options)
        self.query_projection = nn.Linear(self.hidden, attention, bias=False, **options)
        self.score_projection = nn.Linear(attention, 1, bias=False, **options)  # a bias would cancel in the softmax
        self.language_lstm = nn.LSTMCell(self.image_dim + self.hidden, self.hidden, **options)
        self.classifier = nn.Linear(self.hidden, vocabulary, **options)

    def forward(self, image, text, *, mask=None, need_weights=False):
        regions = self._regions(image, mask)
        _check_words(text, image.shape[0])
        state = self._start(image)
        states = []
        weights = []
        for word in self.embedding(text).unbind(1):
            state, *weight = self._step(regions, word, state, mask, need_weights)
            states.append(state[1][0])
            weights += weight
        logits = self.classifier(torch.stack(states, 1))
        return (logits, torch.cat(weights, 1)) if need_weights else logits

    @torch.no_grad()
    def generate(self, image, start, length, *, mask=None):
        """The likeliest next word, again and again: int64 ``[B, length]``, after the word `start` (an int)."""
        regions = self._regions(image, mask)
        state = self._start(image)
        word = torch.full((image.shape[0],), checks.integer("start", start), device=image.device)
        words = []
        for _ in range(checks.dimension("length", length)):
            (state,) = self._step(regions, self.embedding(word), state, mask, need_weights=False)
            word = self.classifier(state[1][0]).argmax(-1)
            words.append(word)
        return torch.stack(words, 1)

    def _regions(self, image, mask):
        """What all words need of the regions [B, N, D]: them, the mean of those that take part [B, D], projected."""
        check_features("image", image, ("B", None), ("N", None), ("D", self.image_dim))
        image = where_taking_part("image", image, mask)
        count = max(image.shape[1], 1) if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
        return image, image.sum(1) / count, self.image_projection(image)

    def _start(self, image):
        """(state and cell of the attention's LSTM), (of the language's), all 0."""
        zero = image.new_zeros(image.shape[0], self.hidden)
        return (zero, zero), (zero, zero)

    def _step(self, regions, word, state, mask, need_weights):
        """One word further: both LSTMs' states, and where asked for the weights [B, 1, N]."""
        image, mean, projected = regions
        attention, language = state
        attention = self.attention_lstm(torch.cat([language[0], mean, word], 1), attention)
        hidden = (projected + self.query_projection(attention[0])[:, None]).tanh()
        scores = self.score_projection(hidden)
        found = functional.gated_cross_attention(
            scores.new_ones(image.shape[0], 1, 1, 1),
            scores[:, None],
            image[:, None],
            attn_mask=mask,
            scale=1.0,
            need_weights=need_weights,
            backend=self.backend,
        )
        seen, *weights = found if need_weights else (found,)
        language = self.language_lstm(torch.cat([seen[:, 0, 0], attention[0]], 1), language)
        return (attention, language), *(weight[:, 0] for weight in weights)


def _check_words(text, batch):
    checks.is_tensor("text", text)
    if text.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"text must hold words' numbers (int64), got {text.dtype}")
    checks.shape("text", text, ("B", batch), ("T", None))
    if not text.shape[1]:
        raise ValueError(f"text must hold at least one word (T), got shape {list(text.shape)}")
