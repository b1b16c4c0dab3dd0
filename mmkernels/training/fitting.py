"""The training itself."""

import functools
import time
from dataclasses import asdict, dataclass
from itertools import islice

import torch

from .. import checks
from ..data.extras import require
from . import checkpoint
from .checkpoint import State
from .distributed import joined, put, whole
from .evaluation import evaluate
from .history import History
from .modality_dropout import ModalityDropout
from .order import Order, divide, load
from .privacy import PoissonOrder, Privacy, PrivateUpdates, private_copy
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
    privacy: Privacy | None

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
        if self.privacy is not None and not isinstance(self.privacy, Privacy):
            raise TypeError(f"privacy must be a Privacy or None, got {type(self.privacy).__name__}")


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
    distributed=None,
    privacy=None,
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
        distributed: ``"ddp"`` or ``"fsdp"`` (FSDP2) in processes that torchrun started, which all call this with the
            same arguments: each computes its share of every step, so that the result is that of one process. (What is
            no mean over samples is of a share alone: batch normalisation's statistics, a contrastive loss.) All end
            with the whole model; the first one alone writes checkpoints and shows progress.
        privacy: a :class:`Privacy`. Every step then takes every sample with the same probability, `batch_size` in the
            mean; :attr:`History.epsilon` is what is guaranteed.
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
    settings = Settings(
        epochs, batch_size, learning_rate, weight_decay, accumulate, precision, modality_dropout, seed, privacy
    )
    if privacy is not None and (recompute or distributed or precision != "float32"):
        raise ValueError("privacy goes without recompute, distributed and bfloat16")
    checks.dimension("checkpoint_every", checkpoint_every)
    device = next(model.parameters()).device
    with joined(distributed, device) as processes:
        trained = private_copy(model) if privacy else processes.shared(model)
        order = (PoissonOrder if privacy else Order)(len(training), batch_size, seed)
        optimizer = torch.optim.AdamW(trained.parameters(), learning_rate, weight_decay=weight_decay)
        # A short training gets further with a rate that rises, then falls to nothing.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * len(order))
        state = State(trained, processes, optimizer, schedule, History())
        bars = functools.partial(require("tqdm.auto").tqdm, disable=not progress or processes.rank > 0)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), recomputation(trained, recompute):
            torch.manual_seed(seed + processes.rank)
            _run(state, training, validation, settings, order, checkpoint_dir, checkpoint_every, bars, title)
        if trained is not model:
            found = trained.state_dict()
            for name, tensor in model.state_dict().items():
                put(tensor, whole(found[name]))
    if privacy:
        state.history.epsilon = privacy.epsilon(order.rate, epochs * len(order))
    return state.history


def _run(state, training, validation, settings, order, checkpoint_dir, checkpoint_every, bars, title):
    """All steps that are left, from where a checkpoint says."""
    identity = {**asdict(settings), "samples": len(training)}

    def keep():
        if checkpoint_dir is not None:
            checkpoint.save(checkpoint_dir, state, identity)

    if checkpoint_dir is not None:
        checkpoint.restore(checkpoint_dir, state, identity)
    called, private = state.processes.called(state.model), None
    if settings.privacy:
        private = PrivateUpdates(state.model, state.optimizer, settings.privacy, order.batch_size)
        called = private.called
    for epoch, steps in islice(enumerate(order.epochs()), state.epoch, settings.epochs):
        if hasattr(training, "redraw"):
            training.redraw(epoch)
        state.model.train()
        name = f"{title}, epoch {epoch + 1} of {settings.epochs}"
        with bars(steps, name, initial=state.step, total=len(steps)) as bar:
            for samples in steps[state.step :]:
                _step(state, called, private, training, samples, settings)
                bar.update()
                bar.set_postfix(state.history.recent())
                if state.step % checkpoint_every == 0:
                    keep()
            if validation is not None:
                found = evaluate(state.model, validation, batch_size=settings.batch_size, processes=state.processes)
                state.history.validation.append(found)
                headline = state.model.task.headline
                bar.set_postfix({f"validation {headline}": f"{found[headline]:.3g}"})
        state.epoch, state.step = epoch + 1, 0
        keep()


def _step(state, called, private, training, samples, settings):
    """One update by these samples, recorded; `called` is the model for those that train it together, or privately."""
    processes = state.processes
    task = state.model.task
    device = next(state.model.parameters()).device
    dropout = ModalityDropout(settings.modality_dropout, settings.seed)
    drawn = dropout.draw(state.epoch, state.step, len(samples))
    seconds = 0.0
    counted = torch.zeros(5, dtype=torch.float64, device=device)  # the loss, and a tally
    parts = processes.own(divide(samples, processes.count * settings.accumulate)) if samples else []
    if private:
        parts = [part for part in parts if part[1]]
    state.optimizer.zero_grad()
    for i, (positions, share) in enumerate(parts, 1):
        batch = load(training, [samples[i] for i in positions])
        if private:
            private.check(batch)
        batch = dropout.apply(batch, drawn[list(positions)]).to(device)
        start = time.perf_counter()
        with processes.unless_last(called, last=i == len(parts)):
            loss, logits = backward(
                called,
                batch,
                share=1.0 if private else share * processes.count,  # gradients become the mean over processes
                precision=settings.precision,
                positive_weight=getattr(training, "positive_weight", None),
            )
        if private:
            private.add(last=i == len(parts))
        counted[0] += loss.double() * share
        if share:
            counted[1:] += tally(task, logits, batch.target)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    if not private:
        state.optimizer.step()
    elif not samples:
        private.add(last=True)  # noise alone
    loss, *counted = processes.total(counted).tolist()
    seconds += time.perf_counter() - start
    state.schedule.step()
    state.step += 1
    state.history.losses.append(loss)
    state.history.step_seconds.append(seconds)
    if (score := accuracy(counted)) is not None:
        state.history.accuracies.append(score)
