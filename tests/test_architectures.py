"""The article's architectures, each with every fusion: training, missing modalities, sound, where they look."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from support.attention_tests import assert_module, assert_rule, draw

from mmkernels.models import ImageTextModel
from mmkernels.models.architectures import contrastive_loss
from mmkernels.models.encoders import SoundEncoder

ARCHITECTURES = ("article", "shared", "aligned", "hierarchical")
FUSIONS = ("spatial", "channel", "gated", "bidirectional", "additive")
# name, outputs, texts an image (None: one, without a dimension of its own)
TASKS = (("binary", 1, None), ("binary", 1, 2), ("multiclass", 3, 2), ("multilabel", 3, None), ("regression", 2, None))
WITH_WORDS = ("gated", "bidirectional")
every = pytest.mark.parametrize("architecture, fusion", list(itertools.product(ARCHITECTURES, FUSIONS)))
BATCH = 3
NAN = float("nan")


def build(architecture="article", fusion="spatial", **options):
    torch.manual_seed(0)
    channels = (8, 8, 8) if architecture == "hierarchical" else (8, 8)
    small = {"channels": channels, "embedding": 12, "hidden": 16, "num_heads": 2}
    return ImageTextModel(50, architecture=architecture, fusion=fusion, **small | options)


def inputs(texts=None, size=24, sound=False):
    """image, text and sound, the latter or None; padding is in between and behind."""
    text = torch.randint(1, 50, (BATCH, texts or 1, 6), generator=torch.Generator().manual_seed(1))
    text[0, 0, 2] = 0
    text[1, 0, 3:] = 0
    spectrogram = draw(BATCH, 10, 13, seed=2)
    spectrogram[1, :, 7:] = NAN
    return draw(BATCH, 3, size, size), text if texts else text[:, 0], spectrogram if sound else None


def target_for(task, outputs, texts):
    shape = (BATCH, texts) if texts else (BATCH,)
    if task == "multiclass":
        return torch.arange(BATCH * (texts or 1)).view(shape) % outputs
    shape = shape if outputs == 1 else (*shape, outputs)
    numbers = draw(*shape, seed=3)
    return numbers if task == "regression" else (numbers > 0).float()


def train(model, arguments, target, steps):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = model(*arguments, target=target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every
def test_every_task(architecture, fusion):
    """Trains: the loss falls, every parameter has a gradient, and what is predicted has the task's shape."""
    for number, (task, outputs, texts) in enumerate(TASKS):
        sound = number % 2 == 1
        model = build(architecture, fusion, task=task, outputs=outputs, sound=sound)
        arguments = inputs(texts, sound=sound)
        losses = train(model, arguments, target_for(task, outputs, texts), 3)
        assert losses[-1] < losses[0], task
        assert all(p.grad is not None for p in model.parameters())
        shape = (BATCH, *([texts] if texts else []), *([outputs] if outputs > 1 else []))
        predicted = model.predict(*arguments)
        assert predicted.shape == shape and not predicted.requires_grad
        assert torch.equal(predicted, model.task.predict(model(*arguments)))


@every
def test_fused_and_plain_train_alike(architecture, fusion):
    """Same seed, same data: the same losses step by step."""
    image, text, sound = inputs(2, sound=True)
    target = target_for("binary", 1, 2)

    def losses(backend, dtype):
        model = build(architecture, fusion, sound=True, backend=backend).to(dtype)
        return torch.tensor(
            train(model, (image.to(dtype), text, sound.to(dtype)), target.to(dtype), 3),
            dtype=dtype,
        )

    fused, plain = (losses(backend, torch.float32) for backend in (None, "reference"))
    assert_rule(fused, truth=losses("reference", torch.float64), peer=plain)


@every
def test_several_texts_an_image(architecture, fusion):
    model = build(architecture, fusion)
    one_by_one = lambda m, image, text: torch.stack([m(image, each) for each in text.unbind(1)], 1)
    image, text, _ = inputs(3)
    assert_module(one_by_one, model, (image, text), found=model(image, text))


@every
def test_attention_sums_to_one(architecture, fusion):
    model = build(architecture, fusion, sound=True)
    image, text, sound = inputs(2, sound=True)
    found = model.attention(image, text, sound)
    size = model.image_encoder(image, model.num_levels)[-len(model.fusion_names)].shape[2:]
    assert found.shape == (BATCH, 2, *size) and (found >= 0).all()
    one = torch.ones(BATCH, 2)
    assert_rule(found.sum((2, 3)), truth=one.double(), peer=one, batch=BATCH)
    assert found.std() > 1e-7  # not the same everywhere
    without = model.attention(image, text[:, 0], text_present=torch.zeros(BATCH, dtype=torch.bool))
    assert_rule(without.sum((1, 2)), truth=one[:, 0].double(), peer=one[:, 0])
    if fusion not in WITH_WORDS:
        with pytest.raises(ValueError, match="fusion must be 'gated' or 'bidirectional'"):
            model.word_attention(image, text)
        return
    words = model.word_attention(image, text, sound)
    assert words.shape == (*text.shape, *size)
    assert not words[text == 0].any()
    sums = torch.ones(BATCH, 2, *size)
    assert_rule(words.sum(2), truth=sums.double(), peer=sums, batch=BATCH)


@every
def test_the_same_again(architecture, fusion):
    """From its config, by way of JSON; copied, and pickled."""
    model = build(architecture, fusion, sound=True, norm="group")
    arguments = inputs(2, sound=True)
    config = json.loads(json.dumps(model.config))
    assert config == model.config
    again = ImageTextModel(**config)
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and other.config == config
        assert torch.equal(other(*arguments), model(*arguments))


@every
@pytest.mark.parametrize("substitutes", [True, False])
def test_what_is_missing_reaches_nothing(architecture, fusion, substitutes):
    """NaN, and token ids that there aren't, against zeros: the same bits of loss, logits and gradients."""
    model = build(architecture, fusion, sound=True, substitutes=substitutes)
    image, text, sound = inputs(2, sound=True)
    target = target_for("binary", 1, 2)
    present = {f"{name}_present": torch.arange(BATCH) != i for i, name in enumerate(("image", "text", "sound"))}

    def run(fill, token):
        model.zero_grad()
        filled = image.clone(), text.clone(), sound.clone()
        for i, (tensor, value) in enumerate(zip(filled, (fill, token, fill))):
            tensor[i] = value
        found = model(*filled, **present, target=target)
        found[0].backward()
        return [*found, *(p.grad for p in model.parameters())]

    for one, other in zip(run(NAN, 10**9), run(0, 1)):
        assert one.isfinite().all() and torch.equal(one, other)


@every
def test_none_is_missing_in_all_samples(architecture, fusion):
    model = build(architecture, fusion, sound=True)
    given = dict(zip(("image", "text", "sound"), inputs(sound=True)))
    nowhere = torch.zeros(BATCH, dtype=torch.bool)
    for name in given:
        compute = lambda m, *tensors: m(*tensors, **{f"{name}_present": nowhere})
        assert_module(compute, model, list(given.values()), found=model(**given | {name: None}))
