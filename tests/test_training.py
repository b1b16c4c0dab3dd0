"""Training, whatever the task: what is fitted, predicted and measured. Needs mmkernels[demo]."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule
from support.samples import OUTPUTS, Samples, Toy
from torch.optim.optimizer import register_optimizer_step_pre_hook

for package in ("tqdm", "torchmetrics"):
    pytest.importorskip(package)

from mmkernels import training  # noqa: E402

FITTED = {"epochs": 2, "batch_size": 6, "progress": False}


def parameters(model):
    return [p.detach() for p in model.parameters()]


def fitted(model, data, **options):
    training.fit(model, data, **{**FITTED, **options})
    return parameters(model)


@pytest.mark.parametrize("texts", [None, 2])
@pytest.mark.parametrize("task", OUTPUTS)
def test_every_task(task, texts):
    data = Samples(task, texts=texts)
    model = Toy(task)
    before = training.evaluate(model, data)
    history = training.fit(model, data, validation=data, epochs=30, batch_size=10, learning_rate=0.05, progress=False)
    found = training.evaluate(model, data, batch_size=7)
    last = history.validation[-1]
    assert found.pop("confusion", None) == last.pop("confusion", None)
    assert found == pytest.approx(last), "however many at a time"
    assert len(history.losses) == 60 and len(history.accuracies) == (0 if task == "regression" else 60)
    assert found["loss"] < before["loss"] / 2

    predicted = training.predict(model, data, batch_size=7)
    batch = data.collate(list(range(len(data))))
    with torch.no_grad():
        assert_rule(predicted, model.task.predict(copy.deepcopy(model).double()(**wide(batch))), predicted)
    target = batch.target
    if task == "regression":
        assert found["mae"] == pytest.approx((predicted - target).abs().mean().item())
        assert found["rmse"] == pytest.approx(found["loss"] ** 0.5)
        return
    right = model.task.decide(predicted) == target
    assert found["accuracy"] == pytest.approx(right.float().mean().item()) and found["accuracy"] > 0.9
    if task == "binary":
        higher = predicted[target == 1][:, None] > predicted[target == 0]
        assert found["auc"] == pytest.approx(higher.float().mean().item())
    if "warm" in batch.parts and right.dim() == 1:
        assert found["warm"] == pytest.approx(right[batch.parts["warm"]].float().mean().item())


def wide(batch):
    return {"image": batch.inputs["image"].double(), "text": batch.inputs["text"]}


def test_seed_decides_and_the_callers_numbers_go_on():
    data = Samples()
    state = torch.get_rng_state()
    runs = [fitted(Toy(dropout=0.5), data, seed=seed) for seed in (0, 0, 1)]
    assert all(map(torch.equal, runs[0], runs[1])) and not all(map(torch.equal, runs[0], runs[2]))
    torch.set_rng_state(state)
    model = Toy(dropout=0.5)
    state = torch.get_rng_state()
    fitted(model, data)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("task", OUTPUTS)
@pytest.mark.parametrize("accumulate", [2, 4, 7])
def test_accumulated_is_the_large_batch(task, accumulate):
    """Also where micro-batches are of different sizes (6 = 2 + 2 + 1 + 1), or more than there are samples."""
    data = Samples(task)

    def run(accumulate, dtype=torch.float32):
        found = copy.copy(data)
        if dtype == torch.float64:
            found.collate = lambda items: double(data.collate(items))
        model = Toy(task).to(dtype)
        gradients = []  # AdamW hides a wrong scale, so they are compared, too
        remember = lambda optimizer, *_: gradients.append([p.grad.clone() for p in model.parameters()])
        handle = register_optimizer_step_pre_hook(remember)
        try:
            history = training.fit(model, found, **FITTED, accumulate=accumulate)
        finally:
            handle.remove()
        return [torch.tensor(history.losses, dtype=dtype), *gradients[0]]

    assert_rule(run(accumulate), run(1, torch.float64), run(1))


def double(batch):
    batch.inputs["image"] = batch.inputs["image"].double()
    batch.target = batch.target.double() if batch.target.is_floating_point() else batch.target
    return batch


def test_bfloat16():
    """Under autocast: other numbers, parameters as they were, and it learns."""
    data = Samples()
    model = Toy()
    seen = []
    model.fusion[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    history = training.fit(model, data, epochs=60, learning_rate=0.03, progress=False, precision="bfloat16")
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.accuracies[-1] > 0.9


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an int"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be at least 0 and finite, got nan"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0"),
        ({"precision": "float16"}, ValueError, "precision must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
    ],
)
def test_mistakes(options, error, named):
    with pytest.raises(error, match=named):
        training.fit(Toy(), Samples(), progress=False, **options)


def test_no_samples_or_targets():
    for what in (training.fit, training.evaluate, training.predict):
        with pytest.raises(ValueError, match="must have at least one sample, got none"):
            what(Toy(), Samples(count=0))
    data = Samples()
    collate = data.collate
    data.collate = lambda items: type(collate(items))(collate(items).inputs)
    assert training.predict(Toy(), data).shape == (20,)
    with pytest.raises(ValueError, match="data must have targets"):
        training.evaluate(Toy(), data)
