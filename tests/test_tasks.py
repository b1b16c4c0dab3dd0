"""What a model is asked. Needs mmkernels[demo] for the metrics."""

import math

import pytest
import torch

from mmkernels import tasks

SIZES = {"binary": 1, "multiclass": 3, "multilabel": 3, "regression": 1}


def sample(task, *batch):
    """Logits and a target that is theirs."""
    shape = batch if task.outputs == 1 else (*batch, task.outputs)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    answer = task.decide(task.predict(logits.detach()))
    return logits, answer if task.name == "multiclass" else answer.double()


@pytest.mark.parametrize("name", tasks.NAMES)
@pytest.mark.parametrize("batch", [(4,), (4, 2)])
def test_loss_falls_towards_the_target(name, batch):
    task = tasks.get(name, SIZES[name])
    logits, target = sample(task, *batch)
    target = target + 1 if name == "regression" else target
    before = task.loss(logits, target)
    (grad,) = torch.autograd.grad(before, logits)
    assert before.dim() == 0
    assert task.loss(logits - 1e-3 * grad, target) < before


@pytest.mark.parametrize("name", ["binary", "multilabel"])
@pytest.mark.parametrize("weight", [1, 3])
def test_chance_is_ln_2_whatever_a_yes_counts(name, weight):
    task = tasks.get(name, SIZES[name])
    target = torch.tensor([1.0] + [0.0] * weight).expand(3, -1).T
    target = target[:, 0] if task.outputs == 1 else target
    assert task.loss(torch.zeros_like(target), target, weight).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_metrics_of_right_answers(name):
    pytest.importorskip("torchmetrics")
    task = tasks.get(name, SIZES[name])
    torch.manual_seed(0)
    logits, target = sample(task, 50)
    metrics = task.metrics()
    metrics.update(task.predict(logits.detach()), target if name == "regression" else target.long())
    found = metrics.compute()
    assert task.headline in found
    if name == "regression":
        assert found["mae"] == found["rmse"] == 0
        return
    assert found["accuracy"] == found["f1"] == 1
    assert found["confusion"].sum() == target.numel()
    assert 0.9 < found["auc"] <= 1 + torch.finfo(torch.float32).eps


def test_predictions_are_probabilities():
    logits = torch.randn(5, 3)
    assert torch.equal(tasks.get("multiclass", 3).predict(logits), logits.softmax(-1))
    assert torch.equal(tasks.get("multilabel", 3).predict(logits), logits.sigmoid())
    assert torch.equal(tasks.get("binary").decide(torch.tensor([0.4, 0.6])), torch.tensor([False, True]))


@pytest.mark.parametrize(
    "name, outputs, message",
    [
        ("ranking", 1, "task must be one of 'binary'"),
        ("binary", 2, "outputs must be 1 for binary, got 2"),
        ("multiclass", 1, "outputs must be at least 2 for multiclass, got 1"),
        ("multilabel", 0, "outputs must be at least 1 for multilabel, got 0"),
    ],
)
def test_mistakes_in_a_task(name, outputs, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name, outputs)


@pytest.mark.parametrize(
    "name, target, message",
    [
        ("binary", torch.zeros(3), r"target must be like the logits, \[4\], got \[3\]"),
        ("binary", torch.zeros(4, dtype=torch.int64), "target of binary must be float, got torch.int64"),
        ("multiclass", torch.zeros(4), r"target must be int64 \[4\], a class a sample, got torch.float32 \[4\]"),
    ],
)
def test_mistakes_in_a_target(name, target, message):
    task = tasks.get(name, SIZES[name])
    logits = torch.zeros(4) if task.outputs == 1 else torch.zeros(4, task.outputs)
    with pytest.raises((TypeError, ValueError), match=message):
        task.loss(logits, target)


def test_a_positive_weight_needs_yes_and_no():
    with pytest.raises(ValueError, match="positive_weight goes with binary and multilabel, not with multiclass"):
        tasks.get("multiclass", 3).loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 2)
