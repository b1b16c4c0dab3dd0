"""Leaves modalities out while training, so that a model learns to do without them."""

import random

import torch
from torch.nn import functional as F

MODALITIES = ("image", "text", "sound")


class ModalityDropout:
    """Every modality of every sample is left out with probability `rate`, but never all that a sample has.

    What is drawn depends on seed, epoch, step and the sample's position in it: on nothing that divides a step.
    """

    def __init__(self, rate, seed):
        self.rate = rate
        self.seed = seed

    def draw(self, epoch, step, samples):
        """For a step of so many samples, what :meth:`apply` takes: float ``[samples, modalities]``."""
        seed = random.Random(f"{self.seed} {epoch} {step}").getrandbits(63)
        return torch.rand(samples, len(MODALITIES), generator=torch.Generator().manual_seed(seed))

    def apply(self, batch, drawn):
        """Marks what is left out of a batch whose rows were drawn, in its ``*_present``; the batch, changed."""
        names = [name for name in MODALITIES if name in batch.inputs]
        if not self.rate:
            return batch
        everywhere = torch.ones(len(batch), dtype=torch.bool)
        present = torch.stack([batch.inputs.get(f"{name}_present", everywhere) for name in names], 1)
        chance = drawn[:, : len(names)]
        last = F.one_hot(chance.where(present, -1).argmax(1), len(names)).bool() & present
        kept = present & (chance >= self.rate)
        kept |= last & ~kept.any(1, keepdim=True)
        batch.inputs.update({f"{name}_present": kept[:, i] for i, name in enumerate(names)})
        return batch
