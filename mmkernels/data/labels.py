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


def _number(text):
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
