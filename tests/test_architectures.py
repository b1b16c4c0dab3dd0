"""The article's architectures, each with every fusion: training, missing modalities, sound, where they look."""

import copy
import itertools
import json
import pickle
import re
from pathlib import Path

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
PAGE = Path(__file__).resolve().parent.parent / "docs/image-text-model.md"
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
        losses = train(model, arguments, target_for(task, outputs, texts), 2)
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
            train(model, (image.to(dtype), text, sound.to(dtype)), target.to(dtype), 2),
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


@pytest.mark.parametrize("architecture, fusion", list(zip(ARCHITECTURES, FUSIONS)))
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


@pytest.mark.parametrize("length", [1, 4, 7])
def test_padded_frames_never_change_a_result(length):
    encoder = SoundEncoder(6)
    sound = torch.full((2, 5, 9), NAN)
    sound[:, :, :length] = draw(2, 5, length)
    alone = encoder(sound[:, :, :length])
    padded = encoder(sound)
    count = alone.tokens.shape[1]
    assert alone.mask.all() and torch.equal(padded.mask.sum(1), torch.tensor([count, count]))
    assert_module(lambda m, x: m(x).tokens, encoder, [sound[:, :, :length]], found=padded.tokens[:, :count])
    assert_module(lambda m, x: m(x).vector, encoder, [sound[:, :, :length]], found=padded.vector)


def test_contrastive_loss_is_clips():
    """One right text an image: the mean of two cross-entropies."""
    image, text = draw(4, 5), draw(4, 5, seed=1)
    everywhere = torch.ones(4, dtype=torch.bool)

    def cross_entropies(image, text):
        scores = image @ text.T
        which = torch.arange(4)
        loss = torch.nn.functional.cross_entropy
        return (loss(scores, which) + loss(scores.T, which)) / 2

    found = contrastive_loss(image, text, everywhere, everywhere, everywhere)
    assert_rule(found, truth=cross_entropies(image.double(), text.double()), peer=cross_entropies(image, text))


def test_contrastive_loss_of_several_texts():
    """Spelled out, pair by pair: only right ones belong together, and what is missing is in no pair."""
    image, text = draw(3, 4), draw(6, 4, seed=1)
    right = torch.tensor([True, False, True, True, True, False])
    image_present = torch.tensor([True, True, False])
    text_present = torch.tensor([True, True, True, False, True, True])
    own = lambda b, t: t % 3 == b

    def spelled_out(image, text):
        scores = (image @ text.T).exp()
        there = lambda b, t: bool(image_present[b] and text_present[t])
        pairs = [(b, t) for b in range(3) for t in range(6) if there(b, t) and own(b, t) and right[t]]
        assert pairs == [(0, 0), (1, 4)]
        losses = []
        for b, t in pairs:
            texts = [u for u in range(6) if there(b, u) and not (own(b, u) and right[u])]
            images = [a for a in range(3) if there(a, t) and not own(a, t)]
            among_texts = scores[b, t] / (scores[b, t] + sum(scores[b, u] for u in texts))
            among_images = scores[b, t] / (scores[b, t] + sum(scores[a, t] for a in images))
            losses.append(-(among_texts.log() + among_images.log()) / 2)
        return torch.stack(losses).mean()

    found = contrastive_loss(image, text, right, image_present, text_present)
    assert_rule(found, truth=spelled_out(image.double(), text.double()), peer=spelled_out(image, text))
    nothing = contrastive_loss(image, text, torch.zeros_like(right), image_present, text_present)
    assert nothing == 0


def test_the_pages_example():
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1], names)
    assert names["classes"].shape == (2, 3)
    assert names["where"].shape == (2, 14, 14) and names["words"].shape == (2, 7, 14, 14)


@pytest.mark.parametrize("align_at", [0, -1])
def test_aligned_brings_together_what_belongs_together(align_at):
    """The loss is the task's and the contrastive one's: alone, it makes pairs more alike than others."""
    model = build("aligned", align_at=align_at, align_weight=3.0, sound=True)
    image, text, sound = inputs(2, sound=True)
    image = image + torch.arange(BATCH).view(-1, 1, 1, 1)  # noise alone would have one mean
    target = torch.tensor([[1.0, 0.0]] * BATCH)
    loss, logits = model(image, text, sound, target=target)
    torch.manual_seed(0)
    unaligned = build("aligned", align_at=align_at, align_weight=0.0, sound=True)
    assert unaligned(image, text, sound, target=target)[0] < loss
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    present = {"image": None, "text": None, "sound": None}

    def alone():
        encoded, texts, heard, _ = model._encode(image, text, sound, present)
        return model._added_loss(encoded, texts, heard, target), encoded, texts[0]

    for _ in range(40):
        optimizer.zero_grad()
        alone()[0].backward()
        optimizer.step()
    _, encoded, right = alone()
    assert torch.equal((encoded.aligned @ right.aligned.T).argmax(1), torch.arange(BATCH))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norms(norm):
    model = build(norm=norm, channels=(6, 12, 8))
    image, text, _ = inputs()
    assert_module(ImageTextModel.__call__, model.eval(), (image, text))
    kinds = [type(layer).__name__ for layer in model.image_encoder]
    assert kinds.count({"batch": "BatchNorm2d", "group": "GroupNorm"}[norm]) == 3


def test_default_model_is_the_articles():
    """Its parameters, and no others."""
    assert list(ImageTextModel(50).state_dict()) == [
        "image_encoder.0.weight",
        "image_encoder.0.bias",
        "image_encoder.3.weight",
        "image_encoder.3.bias",
        "embedding.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "fusion.text_projection.weight",
        "fusion.text_projection.bias",
        "classifier.weight",
        "classifier.bias",
    ]


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"architecture": "deep"}, ValueError, "architecture must be one of 'article'"),
        ({"fusion": "sum"}, ValueError, "fusion must be one of 'spatial'"),
        ({"task": "ranking"}, ValueError, "task must be one of"),
        ({"task": "binary", "outputs": 2}, ValueError, "outputs must be 1"),
        ({"channels": 8}, TypeError, "channels must be a sequence"),
        ({"channels": (8, 0)}, ValueError, r"channels\[1\] must be at least 1"),
        ({"architecture": "hierarchical", "channels": (8,)}, ValueError, "channels must be at least two"),
        ({"norm": "layer"}, ValueError, "norm must be one of"),
        ({"fusion": "gated", "num_heads": 3}, ValueError, "num_heads must be at least 1 and divide"),
        ({"fusion": "additive", "combine": "multiply"}, ValueError, "num_heads must be 1 with fusion='additive'"),
        ({"architecture": "aligned", "align_at": 2}, ValueError, "align_at must be from -2 to 1"),
        ({"sound": "yes"}, TypeError, "sound must be a bool"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
    ],
)
def test_mistakes_when_built(options, error, named):
    with pytest.raises(error, match=named):
        build(**options)


@pytest.mark.parametrize(
    "change, error, named",
    [
        ({"sound": torch.zeros(2, 4, 9)}, ValueError, r"sound must be \[B, M, F\] with B = 3"),
        ({"sound": torch.zeros(3, 4, 9, dtype=torch.int64)}, ValueError, "sound must be float32"),
        ({"image": None, "text": None, "sound": None}, ValueError, "image, text or sound must be given"),
        ({"image": torch.zeros(3, 3, 9, 9)}, ValueError, "Y and X at least 10"),
        ({"image": None, "image_present": torch.ones(3, dtype=torch.bool)}, ValueError, "image_present must be None"),
        ({"text_present": torch.ones(2, dtype=torch.bool)}, ValueError, "text_present"),
        ({"text_present": torch.ones(3)}, ValueError, "text_present"),
        ({"target": torch.ones(3, 2)}, ValueError, "target must be like the logits"),
        ({"target": 1}, TypeError, "target must be a torch.Tensor"),
    ],
)
def test_mistakes_when_called(change, error, named):
    arguments = dict(zip(("image", "text", "sound"), inputs(sound=True)))
    with pytest.raises(error, match=named):
        build(sound=True)(**arguments | change)


def test_sound_needs_a_model_with_sound():
    image, text, sound = inputs(sound=True)
    with pytest.raises(ValueError, match="sound must be None of a model with sound=False"):
        build()(image, text, sound)


def test_attention_needs_an_image():
    _, text, _ = inputs()
    with pytest.raises(TypeError, match="image must be"):
        build().attention(None, text)


@every
def test_channels_last_and_autocast(architecture, fusion):
    """bfloat16 by autocast stays near; channels_last gives the same numbers."""
    model = build(architecture, fusion)
    image, text, _ = inputs()
    plain = model(image, text)
    last = image.contiguous(memory_format=torch.channels_last)
    assert_module(
        ImageTextModel.__call__, model, (image, text), found=model.to(memory_format=torch.channels_last)(last, text)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(last, text, target=torch.ones(BATCH))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (logits.float() - plain).abs().max() < 0.1 * (1 + plain.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("architecture, fusion", [("shared", "gated"), ("aligned", "bidirectional")])
def test_compiled(architecture, fusion):
    """Traced, forward and backward: the same loss and gradients."""
    model = build(architecture, fusion, sound=True)
    image, text, sound = inputs(2, sound=True)
    target = target_for("binary", 1, 2)

    def gradients(call, module, *arguments):
        loss, _ = call(*arguments, target=target.to(arguments[0].dtype))
        loss.backward()
        found = [loss.detach(), *(p.grad for p in module.parameters())]
        module.zero_grad()
        return found

    found = gradients(torch.compile(model, backend="aot_eager"), model, image, text, sound)
    peer = gradients(model, model, image, text, sound)
    truth = copy.deepcopy(model).double()
    assert_rule(found, gradients(truth, truth, image.double(), text, sound.double()), peer)


def test_gradients_of_every_sample():
    """As opacus collects them by hooks: those of each sample alone, substitutes' too."""
    opacus = pytest.importorskip("opacus", reason="opacus is not installed")
    model = build("hierarchical", "spatial", sound=True)
    model = opacus.validators.ModuleValidator.fix(model).train()  # an LSTM that knows of it
    image, text, sound = inputs(sound=True)
    present = torch.tensor([True, False, True])
    target = target_for("binary", 1, None)

    def one_by_one(module, image, target, sound):
        found = []
        for i in range(BATCH):
            module.zero_grad()
            rows = slice(i, i + 1)
            module(image[rows], text[rows], sound[rows], text_present=present[rows], target=target[rows])[0].backward()
            found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()])
        return [torch.stack(each) for each in zip(*found)]

    double = [tensor.double() for tensor in (image, target, sound)]
    truth = one_by_one(copy.deepcopy(model).double(), *double)
    peer = one_by_one(copy.deepcopy(model), image, target, sound)
    sampled = opacus.GradSampleModule(model, loss_reduction="mean")
    sampled(image, text, sound, text_present=present, target=target)[0].backward()
    assert_rule([p.grad_sample for p in model.parameters()], truth, peer, batch=BATCH)
