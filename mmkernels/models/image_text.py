"""The article's model: a small CNN looks, an LSTM reads, attention brings them together. And what its other
architectures share with it."""

import torch
from torch import nn
from torch.nn import functional as F

from .. import backends, checks, tasks
from .encoders import NORMS, PAD, Image, ImageEncoder, SoundEncoder, Substitutes, read_text
from .fusions import FUSIONS
from .inputs import check_call, check_channels, check_index

ARCHITECTURES = {}


class ImageTextModel(nn.Module):
    """Answers a question about an image and a text, and a sound if there is one: whether they belong together, of which
    class they are, how many stars they would get.

    ::

        image [B, 3, 224, 224] -> Conv 32 3x3, relu, MaxPool 2 -> Conv 64 3x3, relu, MaxPool 2 -> [B, 64, 54, 54]
        text  [B, T]           -> Embedding(10000, 128) -> LSTM(128), its last state -> Linear -> [B, 64]
        both                   -> softmax over positions of <image_n, text>, multiply, mean    -> [B, 64]
                               -> Linear(1), a logit

    That is the article's own model, the default. Its other three architectures have the same encoders, and any
    architecture fuses by any operation. A sound is fused with the image as the text is, by a second layer of the same
    kind; the results stand side by side.

    - ``"article"``: what is fused is classified.
    - ``"shared"``: image positions and text tokens are projected to one space, and go through one layer whose weights
      they share; what is fused, and the text, go through another.
    - ``"aligned"``: independent towers. At the layer `align_at` the mean over positions and the text are projected to
      where a contrastive loss brings them together that belong together; then they are fused.
    - ``"hierarchical"``: modalities are apart at the first resolution, and fused at each further one.

    The latter three classify what is fused beside the text itself, by a hidden layer.

    As printed, the article's code can't run: it takes the Dot of 64 image channels with 128 text channels, and puts a
    Dense layer on a 4-D tensor. So here the text is projected to the image's channels, every position gets a score, and
    the positions are pooled before the prediction. The weights are rescaled to a mean of 1, then multiplied with the
    image, then averaged over positions. That mean is the weighted sum, so ``combine="pool"`` computes it in one pass
    without ever writing the weighted image; ``combine="multiply"`` takes the article's two steps and gives the same
    numbers.

    Args:
        vocabulary: number of token ids; id 0 is padding.
        architecture: see above.
        fusion: which of mmkernels' modules fuses: ``"spatial"``, ``"channel"``, ``"gated"`` (cross-attention),
            ``"bidirectional"`` or ``"additive"``. Gated and bidirectional read the text's tokens, the others its
            vector.
        task, outputs: C, as in :func:`mmkernels.tasks.get`.
        channels: of the convolutions, one a resolution; the last is the attention's D. Default ``(32, 64)``, of the
            hierarchical architecture ``(32, 64, 64)``.
        norm: after each convolution: ``"none"``, ``"batch"``, or ``"group"`` (of eight groups, or as many as divide the
            channels).
        embedding, hidden: sizes of the token embedding and of the LSTM's state.
        num_heads: of the attention, where it has heads; each of spatial attention's has a softmax of its own over its
            share of the channels, each of additive attention's a map of its own. More learn faster.
        combine: ``"pool"`` or ``"multiply"``, see above; of spatial and additive attention.
        align_at: of the aligned architecture: which resolution of the image is compared with the text: -1, the last,
            with the LSTM's last state; another with the mean of the token embeddings.
        align_weight: of the contrastive loss beside the task's.
        sound: whether there is a sound.
        substitutes: whether vectors are learned that stand in for a missing modality; if not, the features of a missing
            image are 0, and a missing text or sound is an empty one. None: but for the article's architecture, whose
            parameters are the article's.
        backend: as in :func:`mmkernels.spatial_attention`. None is the fused layer, ``"reference"`` the plain one.
            The parameters don't depend on it: the same seed gives the same model.

    Shape:
        image: float ``[B, 3, Y, X]``, Y and X at least 10 with two convolutions, 22 with three (any memory format;
            channels_last is the fastest on CPUs).
        text: int64 ``[B, T]``, or ``[B, K, T]`` for K texts an image: the image is then looked at only once. Padding
            (id 0) is skipped wherever it stands and never changes a result. T may be 0; an empty text is the LSTM's
            initial state, a zero vector.
        sound: float ``[B, M, F]``, the log-mel spectrogram, F frames of M bands. A frame with NaN in any band is
            padding, which never changes a result.
        image_present, text_present, sound_present: bool ``[B]``, False where the modality is missing: what stands
            there, NaN included, reaches nothing. A modality that is None is missing in all samples. (With
            ``norm="batch"`` a missing image counts as one of zeros among the others.)
        target, positive_weight: as in :meth:`mmkernels.tasks.Task.loss`.
        result: logits ``[B]`` or ``[B, K]``, with C > 1 ``[B, C]`` or ``[B, K, C]``; with a target ``(loss, logits)``,
            where the loss holds what the architecture adds to the task's.

    Attributes:
        task: the :class:`mmkernels.tasks.Task`.
        config: the arguments, as JSON has them: ``ImageTextModel(**config)`` is such a model again.

    Raises:
        TypeError, ValueError: an argument has a wrong type or shape; the message names it.

    Source: the attention is that of Bahdanau et al. 2015 (arXiv:1409.0473), over positions as in Xu et al. 2015
    (arXiv:1502.03044). The contrastive loss is CLIP's (arXiv:2103.00020), with several texts an image as in Khosla et
    al. 2020 (arXiv:2004.11362).
    """

    architecture = "article"
    default_channels = (32, 64)

    def __init_subclass__(cls, architecture=None, **options):
        super().__init_subclass__(**options)
        if architecture is not None:
            cls.architecture = architecture
            ARCHITECTURES[architecture] = cls

    def __new__(cls, *arguments, architecture="article", **options):
        checks.choice("architecture", architecture, tuple(ARCHITECTURES))
        return super().__new__(ARCHITECTURES[architecture] if cls is ImageTextModel else cls)

    def __init__(
        self,
        vocabulary=10_000,
        *,
        architecture="article",
        fusion="spatial",
        task="binary",
        outputs=1,
        channels=None,
        norm="none",
        embedding=128,
        hidden=128,
        num_heads=1,
        combine="pool",
        align_at=-1,
        align_weight=0.5,
        sound=False,
        substitutes=None,
        backend=None,
    ):
        super().__init__()
        if architecture != self.architecture:
            raise ValueError(
                f"architecture must be {self.architecture!r} of {type(self).__name__}, got {architecture!r}"
            )
        backends.check(backend)
        checks.choice("fusion", fusion, tuple(FUSIONS))
        checks.choice("combine", combine, ("multiply", "pool"))
        checks.choice("norm", norm, tuple(NORMS))
        channels = check_channels(self.default_channels if channels is None else channels)
        if substitutes is None:
            substitutes = architecture != "article"
        self.config = {
            "vocabulary": checks.dimension("vocabulary", vocabulary),
            "architecture": architecture,
            "fusion": fusion,
            "task": task,
            "outputs": checks.dimension("outputs", outputs),
            "channels": channels,
            "norm": norm,
            "embedding": checks.dimension("embedding", embedding),
            "hidden": checks.dimension("hidden", hidden),
            "num_heads": checks.dimension("num_heads", num_heads),
            "combine": combine,
            "align_at": check_index("align_at", align_at, len(channels)),
            "align_weight": checks.number("align_weight", align_weight),
            "sound": checks.flag("sound", sound),
            "substitutes": checks.flag("substitutes", substitutes),
            "backend": backend,
        }
        self.task = tasks.get(task, outputs)
        self.image_encoder = ImageEncoder(channels, norm)
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.fusion_names = []  # one a resolution, the finest first
        width = self._build()
        self.num_levels = self._num_levels()
        self.classifier = nn.Linear(width, outputs)
        self.sound_encoder = SoundEncoder(hidden) if sound else None
        self.substitutes = self._substitutes() if substitutes else None

    # What an architecture defines:

    def _build(self):
        """Makes its layers; returns the channels of what is classified."""
        return self._add_fusion("fusion", self.config["channels"][-1], self.config["hidden"])

    def _num_levels(self):
        """How many of the image's resolutions it reads, the last among them."""
        return len(self.fusion_names)

    def _prepared_image(self, image):
        """What is made of an encoded image, once for all texts."""
        return image

    def _prepared_sequence(self, name, sequence):
        """What is made of an encoded text or sound."""
        return sequence

    def _joined(self, image, text, sound):
        """``[B, width]``, what is classified."""
        return self._pooled(image, text, sound)

    def _added_loss(self, image, texts, sound, target):
        """What it adds to the task's loss, or None."""
        return None

    def forward(
        self,
        image=None,
        text=None,
        sound=None,
        *,
        image_present=None,
        text_present=None,
        sound_present=None,
        target=None,
        positive_weight=None,
    ):
        present = {"image": image_present, "text": text_present, "sound": sound_present}
        image, texts, sound, several = self._encode(image, text, sound, present)
        joined = [self._joined(image, each, sound) for each in texts]
        joined = torch.stack(joined, 1) if several else joined[0]
        logits = self.classifier(self._reaching_idle(joined, image, texts[0], sound))
        if self.config["outputs"] == 1:
            logits = logits.squeeze(-1)
        if target is None:
            return logits
        checks.is_tensor("target", target)
        loss = self.task.loss(logits, target, positive_weight)
        added = self._added_loss(image, texts, sound, target)
        return (loss if added is None else loss + added), logits

    @torch.no_grad()
    def predict(self, image=None, text=None, sound=None, *, image_present=None, text_present=None, sound_present=None):
        """Probabilities, of a regression numbers, like the logits; arguments as in a call."""
        present = {"image_present": image_present, "text_present": text_present, "sound_present": sound_present}
        return self.task.predict(self(image, text, sound, **present))

    @torch.no_grad()
    def attention(self, image, text=None, sound=None, *, image_present=None, text_present=None, sound_present=None):
        """Where it looks: weights that sum to 1, float ``[B, Y', X']`` (``[B, K, Y', X']``), 54 x 54 for 224 x 224;
        arguments as in a call.

        A mean over heads, and over text and sound. Spatial and additive attention have weights over positions, and
        bidirectional attention has them for each word, of which this is the mean. Channel and gated attention have
        none: there it is the share that each position has in what is pooled, the norm of its fused features over the
        sum of the norms. Of the hierarchical architecture it is the mean over resolutions, in the finest one.
        """

        def look(image, text, sound):
            found = _mean_map([self._attention(*place, text, sound)[:, None] for place in self._places(image)])[:, 0]
            return found / found.sum((1, 2), keepdim=True) if len(self.fusion_names) > 1 else found

        present = {"image": image_present, "text": text_present, "sound": sound_present}
        return self._each_text(look, image, text, sound, present)

    @torch.no_grad()
    def word_attention(self, image, text, sound=None, *, image_present=None, text_present=None, sound_present=None):
        """Which word a position reads: weights that sum to 1 over the words that take part (0 at padding), float ``[B,
        T, Y', X']`` (``[B, K, T, Y', X']``); arguments as in a call.

        Raises:
            ValueError: the fusion has no weights over words: it is neither gated nor bidirectional.
        """
        kind = FUSIONS[self.config["fusion"]]
        if not kind.has_words:
            raise ValueError(
                f"fusion must be 'gated' or 'bidirectional' for word_attention, got {self.config['fusion']!r}: "
                "it has no weights over words"
            )
        checks.is_tensor("text", text)

        def read(image, sequence, sound):
            found = [kind.word_attention(getattr(self, name), f, sequence) for name, f in self._places(image)]
            return _in_order(_mean_map(found), sequence.order, text.shape[-1])

        present = {"image": image_present, "text": text_present, "sound": sound_present}
        return self._each_text(read, image, text, sound, present)

    def encode_text(self, text):
        """Token ids ``[B, T]`` -> ``[B, hidden]``, the LSTM's state after the last token that isn't padding."""
        return read_text(text, self.embedding, self.lstm).vector

    # The layers that fuse:

    def _add_fusion(self, name, image_dim, text_dim):
        """Makes one, and a second one for sound; returns the channels of what they pool."""
        config = self.config
        kind = FUSIONS[config["fusion"]]
        heads = config["num_heads"]
        self.fusion_names.append(name)
        names = [name, f"sound_{name}"] if config["sound"] else [name]
        for each in names:
            setattr(self, each, kind.build(image_dim, text_dim, heads, config["combine"], config["backend"]))
        return len(names) * kind.width(image_dim, text_dim, heads)

    def _places(self, image):
        """(name, features) of each fusion, the finest resolution first."""
        return zip(self.fusion_names, image.levels[-len(self.fusion_names) :])

    def _pairs(self, name, text, sound):
        """The layers of a resolution, each with what it fuses with the image."""
        yield getattr(self, name), text
        if sound is not None:
            yield getattr(self, f"sound_{name}"), sound

    def _pooled(self, image, text, sound):
        kind = FUSIONS[self.config["fusion"]]
        found = [
            kind.pool(module, features, sequence)
            for name, features in self._places(image)
            for module, sequence in self._pairs(name, text, sound)
        ]
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    def _attention(self, name, features, text, sound):
        kind = FUSIONS[self.config["fusion"]]
        found = [kind.attention(module, features, each) for module, each in self._pairs(name, text, sound)]
        return torch.stack(found).mean(0) if len(found) > 1 else found[0]

    def _each_text(self, function, image, text, sound, present):
        checks.is_tensor("image", image)
        image, texts, sound, several = self._encode(image, text, sound, present)
        found = [function(image, each, sound) for each in texts]
        return torch.stack(found, 1) if several else found[0]

    # Encoding, with what is missing:

    def _encode(self, image, text, sound, present):
        """(:class:`Image`, a :class:`Sequence` for each of the K texts, that of the sound or None, whether texts have a
        dimension K)"""
        batch = check_call(
            {"image": image, "text": text, "sound": sound}, present, self.image_encoder.smallest, self.config["sound"]
        )
        several = text is not None and text.dim() == 3
        text = self._encode_text(text, present["text"], batch)
        image = self._encode_image(image, present["image"], batch, text.vector)
        sound = self._encode_sound(sound, present["sound"], batch, text.vector) if self.config["sound"] else None
        return image, text.split(batch) if several else [text], sound, several

    def _encode_image(self, image, present, batch, like):
        if image is None:
            channels = self.config["channels"][-self.num_levels :]
            levels = [like.new_zeros(batch, each, 1, 1) for each in channels]
            present = like.new_zeros(batch, dtype=torch.bool)
        else:
            if present is not None:
                image = image.where(present[:, None, None, None], 0)
            levels = self.image_encoder(image, self.num_levels)
        if present is not None:
            fused = -len(self.fusion_names)
            replaced = [self._replaced(*each, present) for each in zip(self.fusion_names, levels[fused:])]
            levels = levels[:fused] + replaced
        return self._prepared_image(Image(levels, present))

    def _encode_text(self, text, present, batch):
        if text is None:
            device = self.embedding.weight.device
            text = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            present = torch.zeros(batch, dtype=torch.bool, device=device)
        elif text.dim() == 3:
            present = None if present is None else present.repeat_interleave(text.shape[1])
            text = text.flatten(0, 1)
        if present is not None:
            text = text.where(present[:, None], PAD)
        return self._sequence("text", read_text(text, self.embedding, self.lstm), present)

    def _encode_sound(self, sound, present, batch, like):
        if sound is None:
            sound = like.new_full((batch, 1, 1), float("nan"))
            present = like.new_zeros(batch, dtype=torch.bool)
        elif present is not None:
            sound = sound.where(present[:, None, None], float("nan"))
        return self._sequence("sound", self.sound_encoder(sound), present)

    def _sequence(self, name, sequence, present):
        sequence.present = present
        if present is not None and self.substitutes is not None:
            substitute = self.substitutes(name, sequence.vector)
            first = torch.arange(sequence.mask.shape[1], device=present.device) == 0
            sequence.tokens = sequence.tokens.where(present[:, None, None], substitute[:, None])
            sequence.vector = sequence.vector.where(present[:, None], substitute)
            sequence.mask = sequence.mask | (first & ~present[:, None])
        return self._prepared_sequence(name, sequence)

    def _replaced(self, name, features, present):
        """``[B, D, Y, X]``, with the substitute where it isn't present."""
        substitute = 0 if self.substitutes is None else self.substitutes(name, features)[:, :, None, None]
        return features.where(present[:, None, None, None], substitute)

    def _substitutes(self):
        """Of the image one a resolution that is fused, by its fusion's name."""
        fused = self.config["channels"][-len(self.fusion_names) :]
        widths = dict(zip(self.fusion_names, fused), text=self.config["hidden"])
        return Substitutes(**widths, **({"sound": self.config["hidden"]} if self.config["sound"] else {}))

    def _reaching_idle(self, joined, image, text, sound):
        """`joined`, which also gives substitutes that nothing needed their gradients, 0: data-parallel training waits
        for one of all parameters."""
        if self.substitutes is None or not self.training:
            return joined
        idle = list(self.fusion_names) if image.present is None else []
        idle += [name for name, each in (("text", text), ("sound", sound)) if each is not None and each.present is None]
        rows = [self.substitutes(name, joined).sum(1) for name in idle]
        return joined + 0 * sum(rows).view(-1, *[1] * (joined.dim() - 1)) if rows else joined


ARCHITECTURES["article"] = ImageTextModel


def _mean_map(maps):
    """The mean of maps ``[B, T, Y, X]`` of several resolutions, in that of the first."""
    if len(maps) == 1:
        return maps[0]
    return torch.stack([F.interpolate(each, maps[0].shape[2:], mode="bilinear") for each in maps]).mean(0)


def _in_order(words, order, length):
    """Weights of tokens ``[B, T', Y, X]`` where these stood in the text, ``[B, length, Y, X]``; 0 at padding."""
    words = words[:, :length]
    found = words.new_zeros(len(words), length, *words.shape[2:])
    found[torch.arange(len(words), device=words.device)[:, None], order[:, : words.shape[1]]] = words
    return found
