"""What a fitted model answers, and how well."""

import torch

from ..data.extras import require
from .distributed import Processes
from .order import load
from .steps import BATCH

ALONE = Processes(None)


def predict(model, data, *, batch_size=BATCH):
    """The model's predictions, in the data's order.

    Args:
        model: an :class:`mmkernels.models.ImageTextModel`, or another with a `task`.
        data: a data set whose `collate` gives a :class:`mmkernels.data.Batch`.
        batch_size: samples at a time.

    Returns:
        Probabilities or, of a regression, numbers: float ``[samples]``, ``[samples, C]``, and with K texts an image
        ``[samples, K]`` or ``[samples, K, C]``; on the CPU.
    """
    logits, _ = _answers(model, data, batch_size, ALONE)
    return model.task.predict(logits)


def evaluate(model, data, *, batch_size=BATCH, processes=ALONE):
    """Loss and metrics over samples that the model hasn't seen; a data set that draws is asked for each of its `draws`.

    Args:
        model, data, batch_size: as for :func:`predict`.
        processes: those that share in the work, each calling this; :func:`fit` says so. All get the whole result.

    Returns:
        A dict that JSON can hold: ``loss``, the metrics of the model's task (accuracy, auc, f1, confusion; or mae,
        rmse), and of every part that the data set tells apart the accuracy over it.

    Raises:
        ValueError: the data set has no targets, or no samples.
        ImportError: `torchmetrics` isn't installed.
    """
    logits, batches = [], []
    for number in range(getattr(data, "draws", 1)):
        if hasattr(data, "redraw"):
            data.redraw(number)
        found, seen = _answers(model, data, batch_size, processes)
        logits.append(found)
        batches += seen
    logits = torch.cat(logits)
    if any(batch.target is None for batch in batches):
        raise ValueError("data must have targets to be evaluated, got a batch whose target is None")
    target = torch.cat([batch.target for batch in batches])
    task = model.task
    predicted = task.predict(logits)
    metrics = task.metrics(sync_on_compute=False)  # all processes have all answers
    if task.outputs == 1:
        metrics.update(predicted.flatten(), _whole(target.flatten(), task))
    else:
        metrics.update(predicted.flatten(0, -2), _whole(target, task).flatten(0, logits.dim() - 2))
    right = task.decide(predicted) == target
    parts = {name: torch.cat([batch.parts[name] for batch in batches]) for name in batches[0].parts}
    return {
        "loss": task.loss(logits, target).item(),
        **{name: value.tolist() for name, value in metrics.compute().items()},
        **{name: right[part].float().mean().item() for name, part in parts.items()},
    }


def _whole(target, task):
    """Targets as metrics want them: of answers integers, of numbers numbers."""
    return target if task.name == "regression" else target.long()


@torch.no_grad()
def _answers(model, data, batch_size, processes):
    """The logits of all samples, and their batches without what the model was given; on the CPU."""
    if not len(data):
        raise ValueError("data must have at least one sample, got none")
    device = next(model.parameters()).device
    model.eval()
    answers = []
    starts = range(0, len(data), batch_size)
    # All processes call the model equally often: those for whom nothing is left repeat the last batch.
    for first in range(0, len(starts), processes.count):
        start = starts[min(first + processes.rank, len(starts) - 1)]
        batch = load(data, range(start, min(start + batch_size, len(data))))
        logits = model(**batch.to(device).inputs).cpu()
        batch.inputs = {}
        answers += processes.of_each((logits, batch))
    logits, batches = zip(*answers[: len(starts)])
    return torch.cat(logits), batches


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
