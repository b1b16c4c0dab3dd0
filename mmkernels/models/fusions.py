"""How a model uses each operation to fuse an image with a sequence (text or sound): one class an operation, one
interface.

A class has no parameters: those are the operation's public module's, which it builds, calls, and reads for what it was
looking at.
"""

import torch

from .. import functional
from ..modules import (
    AdditiveAttention,
    BidirectionalAttention,
    ChannelAttention,
    GatedCrossAttention,
    SpatialAttention,
)
from ..modules.common import project_heads
from .encoders import mean_of_tokens


class Fusion:
    """The interface. `features` are ``[B, D, Y, X]``, `sequence` a :class:`mmkernels.models.encoders.Sequence`.

    Attributes:
        has_words: whether there are weights over words, for :meth:`word_attention`.
    """

    has_words = False

    @staticmethod
    def build(image_dim, text_dim, num_heads, combine, backend):
        """The operation's module."""
        raise NotImplementedError

    @staticmethod
    def width(image_dim, text_dim, num_heads):
        """Channels of what :meth:`pool` gives."""
        return image_dim

    @staticmethod
    def pool(module, features, sequence):
        """``[B, width]``: what was fused, over all positions."""
        raise NotImplementedError

    @staticmethod
    def attention(module, features, sequence):
        """``[B, Y, X]``, sums to 1: where it looks."""
        raise NotImplementedError

    @staticmethod
    def word_attention(module, features, sequence):
        """``[B, T, Y, X]``, sums to 1 over the words that take part: which of them a position reads."""
        raise NotImplementedError


class Spatial(Fusion):
    """Positions are weighed by how well they match the vector."""

    @staticmethod
    def build(image_dim, text_dim, num_heads, combine, backend):
        # A multiplied image needs weights of mean 1 to be averaged; a pooled one is their weighted sum as it is.
        return SpatialAttention(
            image_dim,
            text_dim,
            num_heads=num_heads,
            layout="bdhw",
            combine=combine,
            rescale=combine == "multiply",
            backend=backend,
        )

    @staticmethod
    def pool(module, features, sequence):
        fused = module(features, sequence.vector)
        return fused if module.combine == "pool" else fused.mean((2, 3))

    @staticmethod
    def attention(module, features, sequence):
        found = module(features, sequence.vector, need_weights=True)[1].mean(1)
        found = found.unflatten(-1, features.shape[2:])
        return found / features[0, 0].numel() if module.rescale else found


class Channel(Fusion):
    """Channels are weighed at every position. There are no weights over positions: where it looks is each position's
    share in what is pooled."""

    @staticmethod
    def build(image_dim, text_dim, num_heads, combine, backend):
        return ChannelAttention(image_dim, text_dim, backend=backend)

    @staticmethod
    def pool(module, features, sequence):
        return Channel._fused(module, features, sequence).mean(1)

    @staticmethod
    def attention(module, features, sequence):
        return _shares(Channel._fused(module, features, sequence), features)

    @staticmethod
    def _fused(module, features, sequence):
        """With weights of mean 1, as spatial attention's are where they are averaged."""
        return features.shape[1] * module(_rows(features), sequence.vector)


class Gated(Fusion):
    """Every position reads the words, and what it reads multiplies it. Where it looks is each position's share in what
    is pooled."""

    has_words = True

    @staticmethod
    def build(image_dim, text_dim, num_heads, combine, backend):
        return GatedCrossAttention(image_dim, text_dim, num_heads, absorb=_absorb(backend), backend=backend)

    @staticmethod
    def pool(module, features, sequence):
        return module(_rows(features), sequence.tokens, mask=sequence.mask).mean(1)

    @staticmethod
    def attention(module, features, sequence):
        return _shares(module(_rows(features), sequence.tokens, mask=sequence.mask), features)

    @staticmethod
    def word_attention(module, features, sequence):
        _, weights = module(_rows(features), sequence.tokens, mask=sequence.mask, need_weights=True)
        return weights.mean(1).mT.unflatten(2, features.shape[2:])


class Bidirectional(Fusion):
    """Positions read the words and words look at positions, from one score matrix; both results are pooled. Where it
    looks is where its words look, in the mean."""

    has_words = True

    @staticmethod
    def build(image_dim, text_dim, num_heads, combine, backend):
        return BidirectionalAttention(
            image_dim, text_dim, image_dim, num_heads, absorb=_absorb(backend), backend=backend
        )

    @staticmethod
    def width(image_dim, text_dim, num_heads):
        return image_dim + text_dim

    @staticmethod
    def pool(module, features, sequence):
        of_image, of_text = module(_rows(features), sequence.tokens, text_mask=sequence.mask)
        return torch.cat([of_image.mean(1), mean_of_tokens(of_text, sequence.mask)], 1)

    @staticmethod
    def attention(module, features, sequence):
        image, words = Bidirectional._projected(module, features, sequence)
        weights = _weights(words, image, module)
        return _normalised(mean_of_tokens(weights.mean(1), sequence.mask), features)

    @staticmethod
    def word_attention(module, features, sequence):
        image, words = Bidirectional._projected(module, features, sequence)
        return _weights(image, words, module, sequence.mask).mean(1).mT.unflatten(2, features.shape[2:])

    @staticmethod
    def _projected(module, features, sequence):
        width = module.embed_dim // module.num_heads
        tokens = sequence.tokens.where(sequence.mask[:, :, None], 0)
        image = project_heads(module, "image_query_projection", "image", _rows(features), width)
        return image, project_heads(module, "text_key_projection", "text", tokens, width)


class Additive(Fusion):
    """A small network scores positions for the vector, once a head."""

    @staticmethod
    def build(image_dim, text_dim, num_heads, combine, backend):
        if combine == "multiply" and num_heads != 1:
            raise ValueError(
                f"num_heads must be 1 with fusion='additive' and combine='multiply', which has one map, got {num_heads}"
            )
        return AdditiveAttention(image_dim, image_dim, text_dim, num_heads, combine=combine, backend=backend)

    @staticmethod
    def width(image_dim, text_dim, num_heads):
        return num_heads * image_dim

    @staticmethod
    def pool(module, features, sequence):
        fused = module(_rows(features), sequence.vector)
        return fused.flatten(1) if module.combine == "pool" else fused.sum(1)

    @staticmethod
    def attention(module, features, sequence):
        _, weights = module(_rows(features), sequence.vector, need_weights=True)
        return weights.mean(1).unflatten(1, features.shape[2:])


FUSIONS = {
    "spatial": Spatial,
    "channel": Channel,
    "gated": Gated,
    "bidirectional": Bidirectional,
    "additive": Additive,
}


def _rows(features):
    """``[B, D, Y, X]`` -> a view ``[B, N, D]``"""
    return features.flatten(2).mT


def _absorb(backend):
    """The plain layer is the published one, which projects."""
    return False if backend == "reference" else None


def _weights(query, key, module, mask=None):
    _, weights = functional.gated_cross_attention(
        query, key, key[..., :1], attn_mask=mask, scale=module.scale, need_weights=True, backend=module.backend
    )
    return weights


def _shares(fused, features):
    """What is pooled, ``[B, N, C]``, as each position's share of it."""
    return _normalised(fused.norm(dim=2), features)


def _normalised(found, features):
    """``[B, N]``, of at least 0, as ``[B, Y, X]`` that sums to 1: the same everywhere where there is nothing."""
    total = found.sum(1, keepdim=True)
    return torch.where(total > 0, found / total, 1 / found.shape[1]).unflatten(1, features.shape[2:])
