"""What a model is asked: yes or no, one class of several, any of several, or a number; with loss and metrics."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import checks
from .data.extras import require

NAMES = ("binary", "multiclass", "multilabel", "regression")


@dataclass(frozen=True)
class Task:
    """One of :func:`get`'s.

    Attributes:
        name: ``"binary"``, ``"multiclass"``, ``"multilabel"`` or ``"regression"``.
        outputs: C, how many logits (or numbers) a model gives for a sample.

    Shape:
        logits: float ``[...]`` where C is 1, else ``[..., C]``.
        target: like logits; of multiclass int64 ``[...]``, the class; of the others float (0 or 1, or numbers).
    """

    name: str
    outputs: int = 1

    def __post_init__(self):
        checks.choice("task", self.name, NAMES)
        least = 2 if self.name == "multiclass" else 1
        if self.outputs < least or (self.name == "binary" and self.outputs > 1):
            expected = "1" if self.name == "binary" else f"at least {least}"
            raise ValueError(f"outputs must be {expected} for {self.name}, got {self.outputs}")

    def loss(self, logits, target, positive_weight=None):
        """The mean loss, a scalar: binary cross-entropy (binary, multilabel), cross-entropy, or squared error.

        Args:
            positive_weight: a yes counts so many times, as when there are so many noes for it; the whole is scaled
                such that chance stays at ln 2. For binary and multilabel alone.
        """
        if positive_weight is not None and self.name not in ("binary", "multilabel"):
            raise ValueError(f"positive_weight goes with binary and multilabel, not with {self.name}")
        if self.name == "multiclass":
            if target.dtype != torch.int64 or target.shape != logits.shape[:-1]:
                shape = list(logits.shape[:-1])
                raise ValueError(
                    f"target must be int64 {shape}, a class a sample, got {target.dtype} {list(target.shape)}"
                )
            return F.cross_entropy(logits.flatten(0, -2), target.flatten())
        self._check(logits, target)
        if self.name == "regression":
            return F.mse_loss(logits, target)
        if positive_weight is None:
            return F.binary_cross_entropy_with_logits(logits, target)
        weight = logits.new_tensor(positive_weight)
        weighted = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        return weighted * ((1 + positive_weight) / (2 * positive_weight))

    def predict(self, logits):
        """Probabilities (binary, multiclass, multilabel) or numbers (regression), like logits."""
        if self.name == "multiclass":
            return logits.softmax(-1)
        return logits if self.name == "regression" else logits.sigmoid()

    def decide(self, predicted):
        """What :meth:`predict` gave, as an answer: yes or no (bool, at 1/2), the class (int64), or the number."""
        if self.name == "multiclass":
            return predicted.argmax(-1)
        return predicted if self.name == "regression" else predicted > 0.5

    @property
    def headline(self):
        """The metric that decides between models, a name of :meth:`metrics`; of regression's, less is better."""
        return "mae" if self.name == "regression" else "accuracy"

    def metrics(self, **options):
        """A torchmetrics MetricCollection, updated with what :meth:`predict` gave and the target, of K samples
        ``[K]`` or ``[K, C]``.

        accuracy, auc (the area under the ROC curve), f1 (the latter two means over classes or labels) and confusion;
        of regression mae and rmse.

        Args:
            options: any that torchmetrics has for each of them, as ``sync_on_compute``.

        Raises:
            ImportError: `torchmetrics` isn't installed.
        """
        metrics = require("torchmetrics")
        if self.name == "regression":
            return metrics.MetricCollection(
                {
                    "mae": metrics.MeanAbsoluteError(**options),
                    "rmse": metrics.MeanSquaredError(squared=False, **options),
                }
            )
        size = {
            "binary": {},
            "multiclass": {"num_classes": self.outputs},
            "multilabel": {"num_labels": self.outputs},
        }
        common = {"task": self.name, **size[self.name], **options}
        return metrics.MetricCollection(
            {
                "accuracy": metrics.Accuracy(**common, average="micro"),
                "auc": metrics.AUROC(**common),
                "f1": metrics.F1Score(**common, average="macro"),
                "confusion": metrics.ConfusionMatrix(**common),
            }
        )

    def _check(self, logits, target):
        if logits.shape != target.shape:
            raise ValueError(f"target must be like the logits, {list(logits.shape)}, got {list(target.shape)}")
        if not target.is_floating_point():
            raise TypeError(f"target of {self.name} must be float, got {target.dtype}")


def get(name, outputs=1):
    """The :class:`Task` of that name with C outputs.

    Raises:
        ValueError: there is no such task, or it can't have so many outputs: binary has 1, multiclass 2 or more.
    """
    return Task(name, outputs)
