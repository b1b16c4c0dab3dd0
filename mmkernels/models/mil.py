"""Multiple-instance learning: a bag of instances, of any number, is classified by what attention takes of them."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import checks
from ..modules import AdditiveAttention
from ..modules.common import check_image


class AttentionMIL(nn.Module):
    """Classifies a bag by the weighted mean of its instances, whose weights a small network learns.

    ::

        a = softmax_n(w . tanh(V image_n))      gated: softmax_n(w . (tanh(V image_n) * sigmoid(U image_n)))
        logits = W sum_n a_n image_n + b

    The hidden vectors, ``N x hidden_dim``, are never written. (The bias of w in the published code moves all scores
    alike, and is left out.)

    Args:
        image_dim: D, channels of the instances, embedded by whatever fits them.
        num_classes: C; 1 is the paper's yes or no.
        hidden_dim: A, size of the attention's hidden vector.
        gated: whether the hidden vector is gated.
        dropout: as in :class:`mmkernels.AdditiveAttention`.
        backend: as in :func:`mmkernels.additive_attention`.

    Shape:
        image ``[B, N, D]``, or with ``offsets`` packed bags ``[rows, D]``, mask bool ``[B, N]`` (``[rows]``), True =
        takes part -> logits ``[B, C]``; with ``need_weights`` also the instances' weights ``[B, 1, N]`` (``[1,
        rows]``). Of a bag without instances the logits are b.

    Source: Ilse et al. 2018, Attention-based Deep Multiple Instance Learning (arXiv:1802.04712), equations 7 to 9.
    """

    def __init__(
        self,
        image_dim,
        num_classes=1,
        *,
        hidden_dim=128,
        gated=False,
        dropout=0.0,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.attention = AdditiveAttention(
            image_dim, hidden_dim, gated=gated, dropout=dropout, backend=backend, **options
        )
        self.classifier = nn.Linear(image_dim, checks.dimension("num_classes", num_classes), **options)

    def forward(self, image, *, mask=None, offsets=None, need_weights=False):
        pooled, weights = self.attention(image, mask=mask, offsets=offsets, need_weights=True)
        logits = self.classifier(pooled[:, 0])
        return (logits, weights) if checks.flag("need_weights", need_weights) else logits


class ClamOutput(NamedTuple):
    """What :class:`ClamSB` gives: logits ``[B, C]``, the instances' scores ``[B, N]`` (packed ``[rows]``) before the
    softmax, -Inf where masked, and, with labels, the loss of the instance classifiers."""

    logits: torch.Tensor
    scores: torch.Tensor
    instance_loss: torch.Tensor | None


class ClamSB(nn.Module):
    """CLAM with a single attention branch: a slide's patches are embedded, pooled by gated attention and classified;
    those with the largest and the smallest scores teach classifiers of instances.

    ::

        h_n = dropout(relu(W_1 image_n + b_1))
        s_n = w . (dropout(tanh(V h_n)) * dropout(sigmoid(U h_n)))
        logits = W softmax_n(s) h + b

    With a bag's label y the classifier of instances of class y learns to call the ``num_samples`` instances of the
    largest scores positive and those of the smallest negative; with ``subtyping``, where classes exclude each other,
    the others' learn to call the former negative. No gradient comes to the scores that way. The loss is the mean of the
    bags' sums over classes (with ``subtyping`` of their means).

    Attention's hidden vectors, ``N x hidden_dim``, are never written. (The published bias of w moves all scores alike,
    and is left out.)

    Args:
        image_dim: D, channels of the patches' features.
        num_classes: C.
        embed_dim, hidden_dim: sizes of h and of the attention's hidden vector: 512 and 256 are the published "small",
            512 and 384 "big".
        gated: False leaves the gate out.
        dropout: of h, of the hidden vector, and of its gate, in training.
        num_samples: instances of the largest, and of the smallest scores; of a smaller bag as many as there are.
        subtyping: see above.
        backend: as in :func:`mmkernels.additive_attention`.

    Shape:
        image ``[B, N, D]``, or with ``offsets`` packed bags ``[rows, D]``; mask bool ``[B, N]`` (``[rows]``), True =
        takes part; label int64 ``[B]``, or None -> :class:`ClamOutput`. A bag without instances has logits b, and no
        part in the loss.

    Source: Lu et al. 2021, Data-efficient and weakly supervised computational pathology on whole-slide images
    (arXiv:2004.09666; doi 10.1038/s41551-020-00682-w).
    """

    def __init__(
        self,
        image_dim=1024,
        num_classes=2,
        *,
        embed_dim=512,
        hidden_dim=256,
        gated=True,
        dropout=0.25,
        num_samples=8,
        subtyping=False,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.image_dim = checks.dimension("image_dim", image_dim)
        self.num_classes = checks.dimension("num_classes", num_classes)
        self.num_samples = checks.dimension("num_samples", num_samples)
        self.subtyping = checks.flag("subtyping", subtyping)
        embed_dim = checks.dimension("embed_dim", embed_dim)
        self.embedding = nn.Linear(self.image_dim, embed_dim, **options)
        self.dropout = nn.Dropout(checks.share("dropout", dropout))
        self.attention = AdditiveAttention(
            embed_dim, hidden_dim, gated=gated, dropout=dropout, backend=backend, **options
        )
        self.classifier = nn.Linear(embed_dim, self.num_classes, **options)
        self.instance_classifiers = nn.ModuleList(nn.Linear(embed_dim, 2, **options) for _ in range(self.num_classes))

    def forward(self, image, *, label=None, mask=None, offsets=None):
        check_image(image, self.image_dim, offsets)
        if offsets is not None:
            offsets = checks.bag_offsets(offsets, image)
        batch, _, grid = checks.image_rows(image, offsets)
        if mask is not None:
            checks.boolean_mask("mask", mask, "image", image, *grid)
            image = image.where(mask[..., None], 0)  # NaN there would reach the embedding's gradient
        if label is not None:
            self._check_label(label, batch)
        features = self.dropout(self.embedding(image).relu())
        pooled, scores = self.attention(features, mask=mask, offsets=offsets, need_scores=True)
        scores = scores.squeeze(-2)
        loss = None
        if label is not None:
            bags = [_taking_part(*bag) for bag in _bags(features, scores, mask, offsets)]
            loss = self._instance_loss(bags, label.tolist())
        return ClamOutput(self.classifier(pooled[:, 0]), scores, loss)

    def _check_label(self, label, batch):
        checks.is_tensor("label", label)
        if label.dtype != torch.int64:
            raise TypeError(f"label must be int64, got {label.dtype}")
        checks.shape("label", label, ("B", batch))
        if batch and not 0 <= int(label.min()) <= int(label.max()) < self.num_classes:
            raise ValueError(f"label must be from 0 to {self.num_classes - 1}, got {label.tolist()}")

    def _instance_loss(self, bags, labels):
        losses = [self._loss_of_bag(*bag, label) for bag, label in zip(bags, labels) if len(bag[0])]
        return torch.stack(losses).mean() if losses else self.classifier.weight.new_zeros(())

    def _loss_of_bag(self, features, scores, label):
        count = min(self.num_samples, len(scores))
        scores = scores.detach()
        top = features[scores.topk(count).indices]
        bottom = features[scores.topk(count, largest=False).indices]
        positive = torch.ones(count, dtype=torch.int64, device=scores.device)
        negative = torch.zeros_like(positive)
        own = self.instance_classifiers[label](torch.cat([top, bottom]))
        loss = F.cross_entropy(own, torch.cat([positive, negative]))
        if not self.subtyping:
            return loss
        others = [each for i, each in enumerate(self.instance_classifiers) if i != label]
        return (loss + sum(F.cross_entropy(each(top), negative) for each in others)) / self.num_classes


def _bags(features, scores, mask, offsets):
    """(features [n, D], scores [n], mask [n] or None) of every bag."""
    if offsets is None:
        return zip(features, scores, [None] * len(features) if mask is None else mask)
    sizes = offsets.diff().tolist()
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    return zip(features.split(sizes), scores.split(sizes), masks)


def _taking_part(features, scores, mask):
    return (features, scores) if mask is None else (features[mask], scores[mask])
