"""One step: forward, backward and update; and what it counts."""

import torch

BATCH = 8  # samples a step


def step(model, optimizer, batch, *, positive_weight=None):
    """One update by one :class:`mmkernels.data.Batch`.

    Returns:
        The logits and the loss from before it; the loss is a float, so the device has been waited for.
    """
    optimizer.zero_grad()
    loss, logits = backward(model, batch, positive_weight=positive_weight)
    optimizer.step()
    return logits, loss.item()


def backward(model, batch, *, share=1.0, precision="float32", positive_weight=None):
    """Adds the gradients of the loss, times `share`, to the parameters'; returns the loss and the logits, detached."""
    device = next(iter(batch.inputs.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss, logits = model(**batch.inputs, target=batch.target, positive_weight=positive_weight)
    (loss * share).backward()
    return loss.detach(), logits.detach()


def tally(task, logits, target):
    """How many answers were right, and how many there were, of both kinds, yes and no: int64 ``[4]``. Those of several
    batches add up to that of all together. For classes all answers are of the first kind."""
    if task.name == "regression":
        return torch.zeros(4, dtype=torch.int64, device=logits.device)
    right = task.decide(task.predict(logits)) == target
    yes = torch.ones_like(right) if task.name == "multiclass" else target == 1
    return torch.stack([count for kind in (yes, ~yes) for count in ((right & kind).sum(), kind.sum())])


def accuracy(tally):
    """Of a tally's four numbers, each kind counting the same; None where nothing was answered."""
    shares = [right / count for right, count in (tally[:2], tally[2:]) if count]
    return sum(shares) / len(shares) if shares else None
