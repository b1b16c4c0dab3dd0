"""Training, whatever the task: what is fitted, predicted and measured. Needs mmkernels[demo]."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule
from support.samples import OUTPUTS, Samples, Toy
from torch.optim.optimizer import register_optimizer_step_pre_hook

for package in ("tqdm", "torchmetrics"):
    pytest.importorskip(package)

import mmkernels as mmk  # noqa: E402
from mmkernels import training  # noqa: E402
from mmkernels.data import Batch  # noqa: E402
from mmkernels.models import ImageTextModel  # noqa: E402
from mmkernels.training.modality_dropout import ModalityDropout  # noqa: E402
from mmkernels.training.recomputation import recomputation  # noqa: E402
from mmkernels.training.steps import backward  # noqa: E402

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


class Recorder(torch.nn.Module):
    """Counts its calls, and normalises its batch."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(8)
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        return self.norm(image)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_bits(precision):
    """Dropout draws the same again, and batch normalisation counts a batch once."""

    def run(recompute):
        model = Toy(dropout=0.5)
        model.encoder.append(Recorder())
        history = training.fit(model, Samples(), **FITTED, recompute=recompute, precision=precision)
        assert "forward" not in vars(model.encoder), "as it was"
        return history.losses, model.state_dict(), model.encoder[-1].calls

    losses, parameters, calls = run(False)
    again, same, more = run(True)
    assert again == losses and more == 2 * calls
    assert all(torch.equal(same[name], value) for name, value in parameters.items())


def test_recomputed_article(extension):
    """The article's model, its fused layer included, with additive attention's dropout in it."""
    draw = torch.Generator().manual_seed(0)
    inputs = {"image": torch.randn(4, 3, 32, 32, generator=draw), "text": torch.randint(0, 9, (4, 3), generator=draw)}
    batch = Batch(inputs, torch.tensor([0.0, 1.0, 1.0, 0.0]))

    def run(wanted):
        torch.manual_seed(0)
        model = ImageTextModel(10)
        pool = mmk.AdditiveAttention(64, 16, query_dim=128, gated=True, dropout=0.5)
        model.fusion = Pooling(pool)
        peak = []
        with (
            recomputation(model, wanted),
            torch.autograd.graph.saved_tensors_hooks(lambda t: peak.append(t.numel()) or t, lambda t: t),
        ):
            backward(model, batch)
        return [p.grad for p in model.parameters()], sum(peak)

    plain, kept = run(False)
    recomputed, less = run(True)
    assert all(map(torch.equal, plain, recomputed)) and less < kept / 2


class Pooling(torch.nn.Module):
    """Additive attention in spatial attention's place."""

    combine = "pool"

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, features, vector):
        return self.attention(features.flatten(2).mT, vector)[:, 0]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_modality_dropout(rate):
    """As often as asked, never all that a sample has, and nothing that it hasn't; however a step is divided."""
    data = Samples(count=4000)
    there = torch.rand(4000, generator=torch.Generator().manual_seed(5)) > 0.25
    batch = data.collate(list(range(4000)))
    batch.inputs["text_present"] = there
    dropout = ModalityDropout(rate, seed=3)
    drawn = dropout.draw(1, 2, 4000)
    inputs = dropout.apply(batch, drawn).inputs
    image = inputs.get("image_present", torch.ones(4000, dtype=torch.bool))
    text = inputs["text_present"]
    assert (image | text).all() and not (text & ~there).any() and image[~there].all()
    both = rate - rate**2 / 2  # one of two is restored where both were left out
    assert abs((~image[there]).float().mean() - both) < 0.03 and abs((~text[there]).float().mean() - both) < 0.03
    half = data.collate(list(range(2000, 4000)))
    half.inputs["text_present"] = there[2000:]
    again = dropout.apply(half, drawn[2000:]).inputs
    assert torch.equal(again["text_present"], text[2000:])
    if rate:
        assert not torch.equal(dropout.draw(1, 3, 4000), drawn)


def test_modality_dropout_in_training():
    """A model that may go without learns to tell something from either alone."""
    data = Samples(count=40)
    models = [Toy(), Toy()]
    for model, rate in zip(models, (0.0, 0.5)):
        training.fit(model, data, epochs=40, batch_size=20, learning_rate=0.05, progress=False, modality_dropout=rate)

    def without(model, name):
        alone = copy.copy(data)
        absent = {f"{name}_present": torch.zeros(40, dtype=torch.bool)}
        alone.collate = lambda items: Batch(data.collate(items).inputs | absent, data.collate(items).target)
        return training.evaluate(model, alone, batch_size=40)["loss"]

    for name in ("image", "text"):
        assert without(models[1], name) < min(0.65, without(models[0], name))


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
        ({"modality_dropout": 1}, ValueError, "modality_dropout must be below 1"),
        ({"modality_dropout": -0.1}, ValueError, "modality_dropout must be from 0 to 1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
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
