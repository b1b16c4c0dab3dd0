"""Fits an image-text model, and tells how well it does."""

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from .data.extras import require

BATCH = 8  # pictures a step


@dataclass
class History:
    """What :func:`fit` recorded.

    Attributes:
        losses, accuracies: of every step, before its update; right and wrong pairs count the same.
        step_seconds: of every step: forward, backward and update, without loading.
        validation: what :func:`evaluate` returned after every epoch.
    """

    losses: list = field(default_factory=list)
    accuracies: list = field(default_factory=list)
    step_seconds: list = field(default_factory=list)
    validation: list = field(default_factory=list)

    @property
    def step_milliseconds(self):
        """The median step. The first ones are warm-up and don't move a median."""
        return statistics.median(self.step_seconds) * 1e3 if self.step_seconds else float("nan")


def fit(
    model,
    training,
    *,
    validation=None,
    epochs=1,
    batch_size=BATCH,
    learning_rate=1e-3,
    seed=0,
    progress=True,
    title="training",
):
    """Trains with Adam and binary cross-entropy, in place; all right pairs together count as much as all wrong ones.

    Args:
        model: an :class:`mmkernels.models.ImageTextModel`.
        training: a :class:`mmkernels.data.Pairs`; its negatives are drawn anew every epoch.
        validation: another one, evaluated after every epoch.
        batch_size: pictures a step; each brings K pairs.
        seed: of the order of the pictures. Together with the model's own seed it decides every step.
        progress: whether to show a progress bar, an epoch a bar.
        title: what the bars are called.

    Returns:
        A :class:`History`.
    """
    tqdm = require("tqdm.auto").tqdm
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    loader = DataLoader(
        training,
        batch_size,
        drop_last=len(training) > batch_size,
        shuffle=True,
        collate_fn=training.collate,
        generator=torch.Generator().manual_seed(seed),
    )
    # A short training gets further with a rate that rises, then falls to nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(1, epochs * len(loader)))
    history = History()
    for epoch in range(epochs):
        training.redraw(epoch)
        model.train()
        with tqdm(loader, f"{title}, epoch {epoch + 1} of {epochs}", disable=not progress) as bar:
            for image, text, label, _ in bar:
                image = image.to(device)
                text = text.to(device)
                label = label.to(device)
                start = time.perf_counter()
                logits, loss = step(model, optimizer, image, text, label, positive_weight=training.negatives)
                schedule.step()
                history.losses.append(loss)
                history.step_seconds.append(time.perf_counter() - start)
                right = label == 1
                history.accuracies.append(
                    (accuracy(logits[right], label[right]) + accuracy(logits[~right], label[~right])) / 2
                )
                bar.set_postfix(
                    loss=f"{statistics.mean(history.losses[-20:]):.3f}",
                    accuracy=f"{statistics.mean(history.accuracies[-20:]):.1%}",
                )
            if validation is not None:
                history.validation.append(evaluate(model, validation, batch_size=batch_size))
                bar.set_postfix(validation=f"{history.validation[-1]['accuracy']:.1%}")
    return history


def step(model, optimizer, image, text, label, *, positive_weight=1):
    """One update; returns the logits and the loss (a float, so the device has been waited for) from before it. A right
    pair counts `positive_weight` times, as many wrong pairs as there are for it; chance is a loss of ln 2."""
    logits = model(image, text)
    weighted = binary_cross_entropy_with_logits(logits, label, pos_weight=logits.new_tensor(positive_weight))
    loss = weighted * ((1 + positive_weight) / (2 * positive_weight))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits.detach(), loss.item()


@torch.no_grad()
def evaluate(model, pairs, *, batch_size=BATCH):
    """Loss and accuracy over pairs that the model hasn't seen; every language with hard and with easy negatives.

    Returns:
        ``loss`` and ``accuracy``, and ``right``, ``hard`` and ``easy``: the accuracies over the texts that describe
        the picture, over its hard and over its easy negatives.
    """
    device = next(model.parameters()).device
    model.eval()
    logits, labels, hards = [], [], []
    for number in range(len(pairs.languages)):
        for image, text, label, hard in DataLoader(pairs.redraw(number), batch_size, collate_fn=pairs.collate):
            logits.append(model(image.to(device), text.to(device)).cpu())
            labels.append(label)
            hards.append(hard)
    logits = torch.cat(logits)
    labels = torch.cat(labels)
    hards = torch.cat(hards)
    right = labels == 1
    parts = {"right": right, "hard": hards, "easy": ~right & ~hards}
    return {
        "loss": binary_cross_entropy_with_logits(logits, labels).item(),
        "accuracy": accuracy(logits, labels),
        **{name: accuracy(logits[part], labels[part]) for name, part in parts.items()},
    }


def accuracy(logits, labels):
    """The share of pairs on whose side of 1/2 the probability is."""
    return ((logits > 0) == (labels == 1)).float().mean().item()


def summary(model, *, batch_size=1, size=224, length=8):
    """The model, layer by layer, as a table (torchinfo's)."""
    device = next(model.parameters()).device
    image = torch.zeros(batch_size, 3, size, size, device=device)
    text = torch.ones(batch_size, length, dtype=torch.int64, device=device)
    return str(
        require("torchinfo").summary(
            model,
            input_data=(image, text),
            verbose=0,
            depth=2,
            device=device,
            col_names=("input_size", "output_size", "num_params"),
        )
    )
