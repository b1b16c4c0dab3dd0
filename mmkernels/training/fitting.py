"""The training itself."""

import time
from dataclasses import dataclass

import torch

from .. import checks
from ..data.extras import require
from .evaluation import evaluate
from .history import History
from .order import Order, divide, load
from .steps import BATCH, accuracy, backward, tally


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a training, beside model and data; checked."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    accumulate: int
    precision: str
    seed: int

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate"):
            checks.dimension(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= checks.number(name, getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        checks.choice("precision", self.precision, ("float32", "bfloat16"))
        checks.integer("seed", self.seed)


def fit(
    model,
    training,
    *,
    validation=None,
    epochs=1,
    batch_size=BATCH,
    learning_rate=1e-3,
    weight_decay=0.0,
    accumulate=1,
    precision="float32",
    seed=0,
    progress=True,
    title="training",
):
    """Trains with AdamW, in place; the rate rises, then falls to nothing (one cycle).

    Args:
        model: an :class:`mmkernels.models.ImageTextModel`, or another with a `task` that, given a target, returns loss
            and logits.
        training: a data set whose `collate` gives a :class:`mmkernels.data.Batch`. One with `redraw` is drawn anew
            every epoch; its `positive_weight`, if it has one, goes into the loss.
        validation: another one, evaluated after every epoch.
        batch_size: samples a step, however they are computed.
        learning_rate, weight_decay: AdamW's; the rate is the cycle's highest.
        accumulate: a step's samples are computed in so many micro-batches, one after the other: less memory, the same
            gradients (of a loss that is a mean over samples).
        precision: ``"bfloat16"`` computes under autocast; parameters and their updates stay as they are.
        seed: of the order of the samples and of what is drawn while training, as dropout. Together with the model's own
            seed it decides every step; the caller's random numbers go on as if nothing had been drawn.
        progress: whether to show a progress bar, an epoch a bar.
        title: what the bars are called.

    Returns:
        A :class:`History`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
        ImportError: a package of ``mmkernels[demo]`` isn't installed.
    """
    settings = Settings(epochs, batch_size, learning_rate, weight_decay, accumulate, precision, seed)
    tqdm = require("tqdm.auto").tqdm
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    order = Order(len(training), batch_size, seed)
    # A short training gets further with a rate that rises, then falls to nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * len(order))
    history = History()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch, steps in zip(range(epochs), order.epochs()):
            if hasattr(training, "redraw"):
                training.redraw(epoch)
            model.train()
            with tqdm(steps, f"{title}, epoch {epoch + 1} of {epochs}", disable=not progress) as bar:
                for samples in bar:
                    _step(model, optimizer, training, samples, settings, history)
                    schedule.step()
                    bar.set_postfix(history.recent())
                if validation is not None:
                    history.validation.append(evaluate(model, validation, batch_size=batch_size))
                    headline = model.task.headline
                    bar.set_postfix({f"validation {headline}": f"{history.validation[-1][headline]:.3g}"})
    return history


def _step(model, optimizer, training, samples, settings, history):
    """One update by these samples, recorded."""
    device = next(model.parameters()).device
    seconds, loss, counted = 0.0, 0.0, 0
    optimizer.zero_grad()
    for positions, share in divide(samples, settings.accumulate):
        batch = load(training, [samples[i] for i in positions]).to(device)
        start = time.perf_counter()
        found, logits = backward(
            model,
            batch,
            share=share,
            precision=settings.precision,
            positive_weight=getattr(training, "positive_weight", None),
        )
        loss += found.item() * share
        counted = counted + tally(model.task, logits, batch.target) * bool(share)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    optimizer.step()
    history.losses.append(loss)
    history.step_seconds.append(seconds + time.perf_counter() - start)
    if (score := accuracy(counted)) is not None:
        history.accuracies.append(score)
