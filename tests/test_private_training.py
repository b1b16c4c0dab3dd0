"""Differentially private training with opacus. Needs mmkernels[demo] and opacus."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule
from support.samples import Samples, Toy

for package in ("tqdm", "torchmetrics", "opacus"):
    pytest.importorskip(package)

from mmkernels import training  # noqa: E402
from mmkernels.models import ImageTextModel  # noqa: E402
from mmkernels.training.privacy import PoissonOrder, Privacy, PrivateUpdates, private_copy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
ARCHITECTURES = ("article", "shared", "hierarchical")
FUSIONS = ("spatial", "channel", "gated", "bidirectional", "additive")


def small(architecture="article", fusion="spatial", backend=None, **options):
    torch.manual_seed(0)
    channels = (4, 8, 8) if architecture == "hierarchical" else (4, 8)
    sizes = {"channels": channels, "embedding": 6, "hidden": 8, "num_heads": 2, "architecture": architecture}
    return ImageTextModel(9, fusion=fusion, backend=backend, **sizes, **options)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_sample_has_its_own_gradients(extension, architecture, fusion):
    """In whole models, with their fused layers and a modality that is missing here and there."""
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, 24, 24, generator=draw)
    text = torch.randint(0, 9, (3, 4), generator=draw)
    target = torch.tensor([0.0, 1.0, 1.0])
    there = torch.tensor([True, False, True])

    def one_by_one(dtype):
        model = small(architecture, fusion, "reference").to(dtype)
        found = []
        for i in range(3):
            model.zero_grad()
            one = slice(i, i + 1)
            model(image[one].to(dtype), text[one], image_present=there[one], target=target[one].to(dtype))[0].backward()
            found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
        return [torch.stack(grads) for grads in zip(*found)]

    model = private_copy(small(architecture, fusion))
    called = PrivateUpdates(model, torch.optim.SGD(model.parameters()), Privacy(1.0), 3).called
    called(image, text, image_present=there, target=target)[0].backward()
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    found = [found[name] for name, _ in small(architecture, fusion).named_parameters()]
    assert_rule(found, one_by_one(torch.float64), one_by_one(torch.float32))


def test_clipped_sum_and_noise():
    """An update moves along the clipped gradients' sum, whatever the micro-batches; noise has its size."""
    data = Samples(count=12)
    model = Toy()
    batch = data.collate(list(range(12)))

    def update(noise, parts):
        private = private_copy(model)
        optimizer = torch.optim.SGD(private.parameters(), 1.0)
        updates = PrivateUpdates(private, optimizer, Privacy(noise, clip=0.01), 12)
        torch.manual_seed(0)
        for part in range(parts):
            some = data.collate(list(range(12)[part::parts]))
            updates.called(**some.inputs, target=some.target)[0].backward()
            updates.add(last=part == parts - 1)
        return torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), private.parameters())])

    def clipped(dtype):
        total = 0
        for i in range(12):
            one = copy.deepcopy(model).to(dtype)
            inputs = {"image": batch.inputs["image"][i : i + 1].to(dtype), "text": batch.inputs["text"][i : i + 1]}
            one(**inputs, target=batch.target[i : i + 1].to(dtype))[0].backward()
            gradient = torch.cat([p.grad.flatten() for p in one.parameters()])
            total = total + gradient * (0.01 / (gradient.norm() + 1e-6)).clamp(max=1)
        return total / 12

    # What is measured is the difference of two parameters, each with its own rounding.
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = lambda dtype: before.to(dtype) - clipped(dtype)
    for parts in (1, 5):
        assert_rule(before - update(1e-12, parts), moved(torch.float64), moved(torch.float32))
    noise = update(50.0, 1) * 12 / 0.01
    assert abs(noise.std().item() / 50 - 1) < 5 / len(noise) ** 0.5


def test_private_training(tmp_path):
    """It learns, tells its epsilon, and one that goes on has the same bits; the model stays what it was."""
    from opacus.accountants import RDPAccountant

    data = Samples(count=60)
    options = dict(epochs=15, batch_size=20, learning_rate=0.1, progress=False)
    model = Toy()
    history = training.fit(
        model, data, **options, privacy=Privacy(0.6), accumulate=2, checkpoint_dir=tmp_path, modality_dropout=0.1
    )
    accountant = RDPAccountant()
    for _ in range(45):
        accountant.step(noise_multiplier=0.6, sample_rate=1 / 3)
    assert history.epsilon == pytest.approx(accountant.get_epsilon(1e-5)) and 1 < history.epsilon < 100
    assert training.evaluate(model, data)["accuracy"] > 0.75
    assert type(model) is Toy and not hasattr(model.classifier.weight, "grad_sample")
    assert training.fit(Toy(), data, **options).epsilon is None
    again = Toy(seed=1)
    same = training.fit(
        again, data, **options, privacy=Privacy(0.6), accumulate=2, checkpoint_dir=tmp_path, modality_dropout=0.1
    )
    assert same == history and all(map(torch.equal, model.parameters(), again.parameters()))


def test_steps_without_samples():
    """Poisson's draw may give none, and noise is added all the same."""
    order = PoissonOrder(3, 1, seed=0)
    sizes = [len(samples) for samples, _ in zip(order.epochs(), range(100)) for samples in samples]
    assert 0 in sizes and len(set(sizes)) > 2 and abs(sum(sizes) / len(sizes) - 1) < 0.25
    model, before = Toy(), Toy()
    training.fit(model, Samples(count=3), epochs=10, batch_size=1, progress=False, privacy=Privacy(1.0))
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"privacy": 1.0}, TypeError, "privacy must be a Privacy or None, got float"),
        ({"privacy": Privacy(1.0), "recompute": True}, ValueError, "privacy goes without recompute"),
        ({"privacy": Privacy(1.0), "precision": "bfloat16"}, ValueError, "privacy goes without recompute"),
    ],
)
def test_mistakes(options, error, named):
    with pytest.raises(error, match=named):
        training.fit(Toy(), Samples(), progress=False, **options)


def test_samples_that_meet():
    fit = lambda model, data: training.fit(model, data, progress=False, privacy=Privacy(1.0))
    with pytest.raises(ValueError, match="privacy must be None for architecture='aligned'"):
        fit(small("aligned"), Samples())
    with pytest.raises(ValueError, match="with batch normalisation, where samples meet, got image_encoder.1"):
        fit(small(norm="batch"), Samples())
    with pytest.raises(
        ValueError, match=r"training must have one text a sample for privacy, \[B, T\], got \[\d+, 2, 1\]"
    ):
        fit(Toy(), Samples(texts=2))
    for options, named in (
        ({"noise": 0}, "noise"),
        ({"noise": 1, "clip": -1}, "clip"),
        ({"noise": 1, "delta": 1}, "delta"),
    ):
        with pytest.raises(ValueError, match=named):
            Privacy(**options)
