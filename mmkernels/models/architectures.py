"""The article's three architectures beside its own model: shared, aligned and hierarchical.

A class has what is its own; :class:`mmkernels.models.ImageTextModel` makes it, and holds the rest.
"""

from dataclasses import replace
from math import log

import torch
from torch import nn
from torch.nn import functional as F

from ..reference.precision import without_autocast
from .encoders import mean_of_tokens
from .fusions import FUSIONS
from .image_text import ImageTextModel


class JointModel(ImageTextModel):
    """Classifies what is fused beside the text itself (and the sound) by a hidden layer."""

    def _add_joint(self, width):
        self.joint = nn.Sequential(nn.Linear(width, self.config["hidden"]), nn.ReLU())
        return self.config["hidden"]

    def _sequences(self):
        """How many there are beside the image."""
        return 1 + self.config["sound"]


class SharedLayer(nn.Module):
    """A transformer's feed-forward layer, ``x + W_2 gelu(W_1 norm(x))``, for positions, tokens and vectors alike."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, features):
        return features + self.contract(F.gelu(self.expand(self.norm(features))))


class SharedModel(JointModel, architecture="shared"):
    """One space, and layers before and after the fusion whose weights all modalities share."""

    def _build(self):
        hidden = self.config["hidden"]
        width = self.config["channels"][-1]
        self.image_projection = nn.Linear(width, width)
        self.text_projection = nn.Linear(hidden, width)
        if self.config["sound"]:
            self.sound_projection = nn.Linear(hidden, width)
        self.before = SharedLayer(width)
        fused = self._add_fusion("fusion", width, width)
        self.fused_projection = nn.Linear(fused, width)
        self.after = SharedLayer(width)
        return self._add_joint((1 + 2 * self._sequences()) * width)

    def _prepared_image(self, image):
        features = image.levels[0]
        rows = self.before(self.image_projection(features.flatten(2).mT))
        return replace(image, levels=[rows.mT.unflatten(2, features.shape[2:])])

    def _prepared_sequence(self, name, sequence):
        projection = getattr(self, f"{name}_projection")
        reads = FUSIONS[self.config["fusion"]].has_words
        tokens = self.before(projection(sequence.tokens)) if reads else sequence.tokens
        return replace(sequence, tokens=tokens, vector=self.before(projection(sequence.vector)))

    def _joined(self, image, text, sound):
        fused = self.after(self.fused_projection(self._pooled(image, text, sound)))
        found = [fused]
        for sequence in (text, sound):
            if sequence is not None:
                vector = self.after(sequence.vector)
                found += vector, fused * vector
        return self.joint(torch.cat(found, 1))


class AlignedModel(JointModel, architecture="aligned"):
    """Independent towers, compared at a layer, then fused."""

    LARGEST_SCALE = log(100)

    def _build(self):
        channels = self.config["channels"]
        hidden = self.config["hidden"]
        self.aligned_level = self.config["align_at"] % len(channels)
        self.aligned_last = self.aligned_level == len(channels) - 1
        width = channels[-1]
        self.image_alignment = nn.Linear(channels[self.aligned_level], width)
        self.text_alignment = nn.Linear(hidden if self.aligned_last else self.config["embedding"], width)
        if self.config["sound"]:
            self.sound_alignment = nn.Linear(hidden, width)
        self.log_scale = nn.Parameter(torch.tensor(-log(0.07)))  # of the similarities, 1 / temperature
        fused = self._add_fusion("fusion", width, hidden)
        return self._add_joint(fused + self._sequences() * (hidden + width))

    def _num_levels(self):
        return len(self.config["channels"]) - self.aligned_level

    def _prepared_image(self, image):
        return self._aligned("image", image, image.levels[0].mean((2, 3)))

    def _prepared_sequence(self, name, sequence):
        if name == "text" and not self.aligned_last:
            return self._aligned(name, sequence, mean_of_tokens(sequence.embedded, sequence.mask))
        return self._aligned(name, sequence, sequence.vector)

    def _aligned(self, name, encoded, vector):
        """0 where it isn't present: that is like nothing."""
        found = F.normalize(getattr(self, f"{name}_alignment")(vector), dim=1)
        return replace(encoded, aligned=found if encoded.present is None else found.where(encoded.present[:, None], 0))

    def _joined(self, image, text, sound):
        found = [self._pooled(image, text, sound)]
        for sequence in (text, sound):
            if sequence is not None:
                alike = image.aligned * sequence.aligned  # adds up to the cosine
                found += sequence.vector, alike * alike.shape[1]
        return self.joint(torch.cat(found, 1))

    def _added_loss(self, image, texts, sound, target):
        right = [None] * len(texts)
        if self.task.name == "binary":
            right = (target.reshape(len(target), -1) > 0.5).unbind(1)
        loss = self._contrastive(image, texts, right)
        if sound is not None:
            loss = loss + self._contrastive(image, [sound], right if len(texts) == 1 else [None])
        return self.config["align_weight"] * loss

    def _contrastive(self, image, sequences, right):
        """Of K sequences a sample; `right` says of each, ``[B]`` (None: all), which belong to their images."""
        scale = self.log_scale.clamp(max=self.LARGEST_SCALE).exp()
        aligned = torch.cat([each.aligned for each in sequences])
        everywhere = torch.ones(len(image.aligned), dtype=torch.bool, device=aligned.device)
        either = lambda mask: everywhere if mask is None else mask
        return contrastive_loss(
            scale * image.aligned,
            aligned,
            torch.cat([either(each) for each in right]),
            either(image.present),
            torch.cat([either(each.present) for each in sequences]),
        )


@without_autocast
def contrastive_loss(image, text, right, image_present, text_present):
    """Images ``[B, A]`` and texts ``[K B, A]`` (the first ones of all images, the second ones, ...) find each other by
    their inner products: ``-log e^s / (e^s + sum of those that are wrong)``, the mean over pairs that belong together,
    for the image among texts and for the text among images. 0 where no pair does.

    Args:
        right: bool ``[K B]``, whether a text belongs to its own image; it belongs to no other.
        image_present, text_present: bool ``[B]``, ``[K B]``: what isn't is in no pair.
    """
    if image.dtype != torch.float64:
        image, text = image.float(), text.float()
    scores = image @ text.mT
    own = torch.eye(len(image), dtype=torch.bool, device=image.device).repeat(1, len(text) // len(image))
    present = image_present[:, None] & text_present
    positive = own & right & present
    negative = ~(own & right) & present
    least = torch.finfo(scores.dtype).min
    losses = []
    for dim in (0, 1):
        others = scores.masked_fill(~negative, least).logsumexp(dim, keepdim=True)
        losses.append(F.softplus(others - scores))
    found = (losses[0] + losses[1]) / 2
    return found.where(positive, 0).sum() / positive.sum().clamp(min=1)


class HierarchicalModel(JointModel, architecture="hierarchical"):
    """Apart at the first resolution, fused at each further one."""

    default_channels = (32, 64, 64)

    def _build(self):
        channels = self.config["channels"]
        if len(channels) < 2:
            raise ValueError(f"channels must be at least two of the hierarchical architecture, got {channels}")
        hidden = self.config["hidden"]
        fused = sum(self._add_fusion(f"fusion_{i}", channels[i], hidden) for i in range(1, len(channels)))
        return self._add_joint(fused + self._sequences() * hidden)

    def _joined(self, image, text, sound):
        sequences = [each.vector for each in (text, sound) if each is not None]
        return self.joint(torch.cat([self._pooled(image, text, sound), *sequences], 1))
