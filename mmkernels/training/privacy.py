"""Differentially private training, with opacus: what a model has learned hardly depends on any single sample."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from .. import checks
from ..data.extras import require
from .order import Order

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Privacy:
    """How private a training has to be: DP-SGD, as Abadi et al. 2016 (arXiv:1607.00133) have it.

    Attributes:
        noise: standard deviation of what is added to the sum of gradients, in multiples of `clip`.
        clip: the norm that a sample's gradient has at most; longer ones are shortened.
        delta: the probability with which the guarantee, epsilon, may fail; well below one over the samples.

    Raises:
        TypeError, ValueError: an attribute isn't a number, or out of range.
    """

    noise: float
    clip: float = 1.0
    delta: float = 1e-5

    def __post_init__(self):
        for name in ("noise", "clip"):
            if not 0 < checks.number(name, getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 < checks.number("delta", self.delta) < 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}")

    def epsilon(self, rate, steps):
        """The guarantee after so many steps, each of which takes every sample with probability `rate`."""
        accountant = require("opacus.accountants", "privacy").RDPAccountant()
        accountant.history = [(self.noise, rate, steps)]
        return accountant.get_epsilon(self.delta)


class PoissonOrder(Order):
    """Every step takes every sample with the same probability, `batch_size` of them in the mean: it may be none."""

    @property
    def rate(self):
        return self.batch_size / self.count

    def epochs(self):
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            draws = (torch.rand(self.count, generator=generator) for _ in range(len(self)))
            yield [(draw < self.rate).nonzero().flatten().tolist() for draw in draws]


def private_copy(model):
    """A copy whose gradients opacus can tell by samples, with parameters of the same names in its state.

    Raises:
        ValueError: samples meet in the model, so that none has a gradient of its own.
    """
    if getattr(model, "architecture", None) == "aligned":
        raise ValueError("privacy must be None for architecture='aligned': its contrastive loss compares samples")
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            raise ValueError(f"privacy must be None with batch normalisation, where samples meet, got {name}")
    found = copy.deepcopy(model)
    lstm = require("opacus.validators.lstm", "privacy")
    for module in list(found.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LSTM:
                setattr(module, name, lstm.fix(child).to(next(child.parameters()).device))
    return found


class PrivateUpdates:
    """Clips every sample's gradient, adds them up over a step's micro-batches, and updates with noise.

    Args:
        model: from :func:`private_copy`.
        optimizer: its.
        privacy: a :class:`Privacy`.
        batch_size: samples of a step in the mean.
    """

    def __init__(self, model, optimizer, privacy, batch_size):
        opacus = require("opacus", "privacy")
        self.called = opacus.GradSampleModule(model, loss_reduction="mean")
        self.optimizer = opacus.optimizers.DPOptimizer(
            optimizer,
            noise_multiplier=privacy.noise,
            max_grad_norm=privacy.clip,
            expected_batch_size=batch_size,
            loss_reduction="mean",
        )

    def check(self, batch):
        text = batch.inputs.get("text")
        if text is not None and text.dim() == 3:
            raise ValueError(f"training must have one text a sample for privacy, [B, T], got {list(text.shape)}")

    def add(self, last):
        """Takes up a micro-batch's gradients; the last one's are followed by the update."""
        for parameter in self.optimizer.params:
            if parameter.grad_sample is None:  # of no sample
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
        self.optimizer.signal_skip_step(not last)
        self.optimizer.step()
        self.optimizer.zero_grad()
