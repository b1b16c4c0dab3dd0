"""The training itself."""

import time
from dataclasses import asdict, dataclass
from itertools import islice

import torch

from .. import checks
from ..data.extras import require
from . import checkpoint
from .checkpoint import State
from .evaluation import evaluate
from .history import History
from .modality_dropout import ModalityDropout
from .order import Order, divide, load
from .recomputation import recomputation
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
    modality_dropout: float
    seed: int

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate"):
            checks.dimension(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= checks.number(name, getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        checks.choice("precision", self.precision, ("float32", "bfloat16"))
        if checks.share("modality_dropout", self.modality_dropout) == 1:
            raise ValueError("modality_dropout must be below 1, got 1: there would be nothing to learn from")
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
    recompute=False,
    modality_dropout=0.0,
    checkpoint_dir=None,
    checkpoint_every=100,
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
        recompute: keeps no activations inside of the model's layers, and computes them again backward: less memory,
            more time, the same bits.
        modality_dropout: the probability that a sample goes without one of its modalities, though never without all.
        checkpoint_dir: a folder where the training's state is written every `checkpoint_every` steps and after every
            epoch, and from where a training that was killed goes on: on the CPU with the bits of one that wasn't.
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
    settings = Settings(epochs, batch_size, learning_rate, weight_decay, accumulate, precision, modality_dropout, seed)
    checks.dimension("checkpoint_every", checkpoint_every)
    tqdm = require("tqdm.auto").tqdm
    device = next(model.parameters()).device
    order = Order(len(training), batch_size, seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    # A short training gets further with a rate that rises, then falls to nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * len(order))
    state = State(model, optimizer, schedule, History())
    identity = {**asdict(settings), "samples": len(training)}

    def keep():
        if checkpoint_dir is not None:
            checkpoint.save(checkpoint_dir, state, identity)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), recomputation(model, recompute):
        torch.manual_seed(seed)
        if checkpoint_dir is not None:
            checkpoint.restore(checkpoint_dir, state, identity)
        for epoch, steps in islice(enumerate(order.epochs()), state.epoch, epochs):
            if hasattr(training, "redraw"):
                training.redraw(epoch)
            model.train()
            name = f"{title}, epoch {epoch + 1} of {epochs}"
            with tqdm(steps, name, disable=not progress, initial=state.step, total=len(steps)) as bar:
                for samples in steps[state.step :]:
                    _step(state, training, samples, settings)
                    bar.update()
                    bar.set_postfix(state.history.recent())
                    if state.step % checkpoint_every == 0:
                        keep()
                if validation is not None:
                    state.history.validation.append(evaluate(model, validation, batch_size=batch_size))
                    headline = model.task.headline
                    bar.set_postfix({f"validation {headline}": f"{state.history.validation[-1][headline]:.3g}"})
            state.epoch, state.step = epoch + 1, 0
            keep()
    return state.history


def _step(state, training, samples, settings):
    """One update by these samples, recorded."""
    model = state.model
    device = next(model.parameters()).device
    dropout = ModalityDropout(settings.modality_dropout, settings.seed)
    drawn = dropout.draw(state.epoch, state.step, len(samples))
    seconds, loss, counted = 0.0, 0.0, 0
    state.optimizer.zero_grad()
    for positions, share in divide(samples, settings.accumulate):
        batch = load(training, [samples[i] for i in positions])
        batch = dropout.apply(batch, drawn[list(positions)]).to(device)
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
    state.optimizer.step()
    seconds += time.perf_counter() - start
    state.schedule.step()
    state.step += 1
    state.history.losses.append(loss)
    state.history.step_seconds.append(seconds)
    if (score := accuracy(counted)) is not None:
        state.history.accuracies.append(score)
