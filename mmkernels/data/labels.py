"""Labels as a CSV file has them, and what a model is trained on."""

import math

import torch

SEPARATOR = "|"


def guess_task(labels):
    """The task that labels look like: with "|" multilabel; numbers (but for a tenth) that aren't whole, or of more than
    20 values, regression; two different ones binary, others multiclass."""
    if any(SEPARATOR in label for label in labels):
        return "multilabel"
    numbers = [value for value in map(_number, labels) if value is not None]
    if len(numbers) >= 0.9 * len(labels):
        if len(set(numbers)) > 20 or any(value != int(value) for value in numbers):
            return "regression"
    return "binary" if len(set(labels)) == 2 else "multiclass"


def split_labels(label):
    """``"a|b"`` -> ``["a", "b"]``; ``"|"`` is none."""
    return [part.strip() for part in label.split(SEPARATOR) if part.strip()]


def wrong_label(label, task, known=None):
    """What is wrong with a label, or None."""
    if task == "regression":
        return None if _number(label) is not None else f"its label {label!r} is no number"
    parts = split_labels(label) if task == "multilabel" else [label]
    unknown = [part for part in parts if known is not None and part not in known]
    return f"its label {unknown[0]!r} is none of {', '.join(known)[:200]}" if unknown else None


def sorted_labels(labels, task):
    """The different ones, in the order of a model's outputs: numbers by size, others by letters. Of two, the second is
    what binary tells the probability of: 1 of 0 and 1, yes of no and yes."""
    if task == "regression":
        return ()
    found = {part for label in labels for part in (split_labels(label) if task == "multilabel" else [label])}
    numbers = all(_number(label) is not None for label in found)
    return tuple(sorted(found, key=(lambda label: (_number(label), label)) if numbers else None))


def target(label, preprocessing):
    """A label as a tensor, as :mod:`mmkernels.tasks` wants it."""
    labels, task = preprocessing.labels, preprocessing.task
    if task == "regression":
        return torch.tensor(preprocessing.standardised(float(label)))
    if task == "multiclass":
        return torch.tensor(labels.index(label))
    if task == "binary":
        return torch.tensor(float(labels.index(label)))
    given = set(split_labels(label))
    answers = torch.tensor([float(name in given) for name in labels])
    return answers if len(labels) > 1 else answers[0]


def answer_columns(predicted, preprocessing):
    """Predictions (probabilities, or a regression's numbers) of B samples as a CSV file has them: a list of B str by
    column. ``predicted`` is the label (of multilabel all that are at least as likely as not), or the number;
    ``probability`` of binary that of the second label, of multiclass that of the predicted one; of several outputs
    ``p(LABEL)`` each one's."""
    labels, task = preprocessing.labels, preprocessing.task
    if task == "regression":
        return {"predicted": [f"{preprocessing.number(value):.8g}" for value in predicted.tolist()]}
    if task == "binary":
        likely = [labels[value > 0.5] for value in predicted.tolist()]
        return {"predicted": likely, "probability": [f"{value:.6f}" for value in predicted.tolist()]}
    values = predicted.view(-1, len(labels)).tolist()
    each = {f"p({label})": [f"{row[number]:.6f}" for row in values] for number, label in enumerate(labels)}
    if task == "multiclass":
        likely = [labels[row.index(max(row))] for row in values]
        return {"predicted": likely, "probability": [f"{max(row):.6f}" for row in values], **each}
    likely = [SEPARATOR.join(label for label, value in zip(labels, row) if value > 0.5) or SEPARATOR for row in values]
    return {"predicted": likely, **each}


def _number(text):
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
