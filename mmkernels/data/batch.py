"""What a data set gives a training: a model's arguments, and what it should answer."""

from dataclasses import dataclass, field

import torch


@dataclass
class Batch:
    """B samples.

    Attributes:
        inputs: the model's keyword arguments, tensors with B samples: image, text, ...
        target: what :meth:`mmkernels.tasks.Task.loss` takes; None where it isn't known.
        parts: bool like a binary target, by name: groups of answers whose accuracy is told apart.
    """

    inputs: dict
    target: torch.Tensor | None = None
    parts: dict = field(default_factory=dict)

    def __len__(self):
        return len(next(iter(self.inputs.values())))

    def to(self, device):
        """The same on another device."""
        return Batch(
            {name: value.to(device) for name, value in self.inputs.items()},
            None if self.target is None else self.target.to(device),
            {name: part.to(device) for name, part in self.parts.items()},
        )
