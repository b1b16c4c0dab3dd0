"""What a training recorded, step by step."""

import statistics
from dataclasses import dataclass, field


@dataclass
class History:
    """What :func:`mmkernels.training.fit` recorded.

    Attributes:
        losses: of every step, before its update.
        accuracies: likewise; of binary and multilabel tasks right and wrong answers count the same. A regression has
            none.
        step_seconds: of every step: forward, backward and update, without loading.
        epsilon: of a private training, what is guaranteed with its `delta`; else None.
        validation: what :func:`mmkernels.training.evaluate` returned after every epoch.
    """

    losses: list = field(default_factory=list)
    accuracies: list = field(default_factory=list)
    step_seconds: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    epsilon: float | None = None

    @property
    def step_milliseconds(self):
        """The median step. The first ones are warm-up and don't move a median."""
        return statistics.median(self.step_seconds) * 1e3 if self.step_seconds else float("nan")

    def recent(self):
        """Loss and accuracy over the last 20 steps, as a progress bar shows them."""
        shown = {"loss": f"{statistics.mean(self.losses[-20:]):.3f}"}
        if self.accuracies:
            shown["accuracy"] = f"{statistics.mean(self.accuracies[-20:]):.1%}"
        return shown
