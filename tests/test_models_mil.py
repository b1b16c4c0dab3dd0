"""Multiple-instance models, against the published ones in plain PyTorch: the same parameters, the same dropout."""

import copy

import pytest
import torch
from support.attention_tests import assert_rule, draw
from torch import nn
from torch.nn import functional as F

from mmkernels.models import AttentionMIL, ClamSB
from mmkernels.reference.dropout import GATE, HIDDEN, draw_seed, dropout_factors

SIZES = (7, 0, 30, 11)  # of bags; of 7 not all that the instance classifiers ask for
ROWS = sum(SIZES)
OFFSETS = torch.tensor([0, 7, 7, 37, 48])
LABEL = torch.tensor([1, 0, 2, 0])


def attention_scores(attention, rows, factors):
    """As published, but for the last bias: [rows]"""
    hidden = attention.image_projection(rows).tanh() * factors[0]
    if attention.gate_projection is not None:
        hidden = hidden * (attention.gate_projection(rows).sigmoid() * factors[1])
    return attention.score_projection(hidden)[:, 0]


def all_factors(attention, rows):
    """What dropout multiplies all rows' hidden units and gates with."""
    if not attention.training or not attention.dropout:
        return [rows.new_ones(len(rows), 1)] * 2
    seed = draw_seed(rows.device)
    shape = rows.shape[:1], attention.hidden_dim
    return [dropout_factors(seed, *shape, which, attention.dropout, rows.dtype) for which in (HIDDEN, GATE)]


def bags_of(rows, mask):
    """Of each bag which rows it has: those of (rows,) packed, or of a batch flattened."""
    taking_part = torch.ones(ROWS, dtype=torch.bool) if mask is None else mask
    return [[r for r in range(a, b) if taking_part[r]] for a, b in zip(OFFSETS, OFFSETS[1:])]


def plain_mil(model, image, *, mask=None):
    """(logits, weights), bag by bag"""
    factors = all_factors(model.attention, image)
    weights, logits = image.new_zeros(ROWS), []
    for bag in bags_of(image, mask):
        a = attention_scores(model.attention, image[bag], [f[bag] for f in factors]).softmax(0)
        weights = weights.index_put((torch.tensor(bag, dtype=torch.int64),), a)
        logits.append(model.classifier(a @ image[bag]))
    return torch.stack(logits), weights[None]


def plain_clam(model, image, *, mask=None):
    """(logits, loss), slide by slide, as model_clam.py of the published code has it"""
    hidden = F.dropout(model.embedding(image).relu(), model.dropout.p, model.training)
    factors = all_factors(model.attention, hidden)
    logits, losses = [], []
    for bag, label in zip(bags_of(image, mask), LABEL.tolist()):
        h = hidden[bag]
        A = attention_scores(model.attention, h, [f[bag] for f in factors])
        logits.append(model.classifier(A.softmax(0) @ h))
        if not bag:
            continue
        k = min(model.num_samples, len(bag))
        ones, zeros = torch.ones(k, dtype=torch.int64), torch.zeros(k, dtype=torch.int64)
        total = 0.0
        for i, classifier in enumerate(model.instance_classifiers):
            top = torch.index_select(h, 0, torch.topk(A, k)[1])
            if i == label:
                bottom = torch.index_select(h, 0, torch.topk(-A, k)[1])
                total += nn.CrossEntropyLoss()(classifier(torch.cat([top, bottom])), torch.cat([ones, zeros]))
            elif model.subtyping:
                total += nn.CrossEntropyLoss()(classifier(top), zeros)
        losses.append(total / len(model.instance_classifiers) if model.subtyping else total)
    return torch.stack(logits), torch.stack(losses).mean()


def ours_mil(model, image, *, mask=None):
    return model(image, offsets=OFFSETS, mask=mask, need_weights=True)


def ours_clam(model, image, *, mask=None):
    found = model(image, label=LABEL, offsets=OFFSETS, mask=mask)
    return found.logits, found.instance_loss


# (model, ours, plain)
MODELS = {
    "mil": (lambda: AttentionMIL(12, hidden_dim=9), ours_mil, plain_mil),
    "mil gated dropout": (lambda: AttentionMIL(12, 3, hidden_dim=9, gated=True, dropout=0.3), ours_mil, plain_mil),
    "clam": (lambda: ClamSB(10, 3, embed_dim=12, hidden_dim=9), ours_clam, plain_clam),
    "clam subtyping": (
        lambda: ClamSB(10, 3, embed_dim=12, hidden_dim=9, subtyping=True, num_samples=4),
        ours_clam,
        plain_clam,
    ),
    "clam without gate": (
        lambda: ClamSB(10, 3, embed_dim=12, hidden_dim=9, gated=False, dropout=0.0),
        ours_clam,
        plain_clam,
    ),
}


def model_and_image(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype)
    channels = 10 if name.startswith("clam") else 12
    return model, draw(ROWS, channels, dtype=dtype)


def everything(function, model, image, dtype, **options):
    """Results, and gradients of the image and the parameters; dropout draws the same every time."""
    model = copy.deepcopy(model).to(dtype)
    image = image.to(dtype).requires_grad_()
    torch.manual_seed(1)
    results = function(model, image, **options)
    upstream = [draw(*r.shape, seed=9 + i).to(r.dtype) for i, r in enumerate(results)]
    grads = torch.autograd.grad(
        results, [image, *model.parameters()], upstream, allow_unused=True, materialize_grads=True
    )
    return *results, *grads


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(extension, name, masked, training):
    model, image = model_and_image(name)
    model.train(training)
    mask = torch.arange(ROWS) % 5 != 1 if masked else None
    _, ours, plain = MODELS[name]
    found = everything(ours, model, image, torch.float32, mask=mask)
    truth = everything(plain, model, image, torch.float64, mask=mask)
    assert_rule(found, truth, everything(plain, model, image, torch.float32, mask=mask))


@pytest.mark.parametrize("name", MODELS)
def test_bags_of_one_size_are_a_batch(extension, name):
    """To the bit where nothing is divided otherwise; dropout counts the same rows."""
    model, image = model_and_image(name)
    image = image[:36]
    mask = torch.arange(36) % 7 != 1
    call = lambda **given: model(**given, **({"label": LABEL[:3]} if isinstance(model, ClamSB) else {}))
    torch.manual_seed(1)
    packed = call(image=image, offsets=[0, 12, 24, 36], mask=mask)
    torch.manual_seed(1)
    batch = call(image=image.view(3, 12, -1), mask=mask.view(3, 12))
    if isinstance(model, ClamSB):
        assert torch.equal(batch.scores.isneginf(), ~mask.view(3, 12))
        packed, batch = (
            (found.logits, found.scores.view(3, 12).where(mask.view(3, 12), 0), found.instance_loss)
            for found in (packed, batch)
        )
    wide = lambda results: [t.double() for t in (results if isinstance(results, tuple) else (results,))]
    assert_rule(batch, wide(packed), packed)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_reaches_nothing(extension, name):
    """NaN there changes no bit of results and gradients, those of parameters included."""
    model, image = model_and_image(name)
    mask = torch.arange(ROWS) % 5 != 1
    run = lambda image: everything(MODELS[name][1], model, image, torch.float32, mask=mask)
    poisoned = image.masked_fill(~mask[:, None], float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(run(image), run(poisoned)))


def test_nothing_takes_part(extension):
    model, image = model_and_image("clam")
    found = model(image, label=LABEL, offsets=OFFSETS, mask=torch.zeros(ROWS, dtype=torch.bool))
    assert torch.equal(found.logits, model.classifier.bias.expand(4, -1)) and found.scores.isneginf().all()
    assert found.instance_loss == 0 and model(image, offsets=OFFSETS).instance_loss is None


def test_instances_give_scores_no_gradient(extension):
    model, image = model_and_image("clam")
    loss = model(image, label=LABEL, offsets=OFFSETS).instance_loss
    attention = list(model.attention.parameters())
    assert not any(g.any() for g in torch.autograd.grad(loss, attention, allow_unused=True, materialize_grads=True))


def test_dropout_in_training_only(extension):
    """Of the embedding a quarter, within five standard deviations; attention's is shown by test_dropout.py."""
    torch.manual_seed(0)
    model = ClamSB(10, embed_dim=512)
    model.embedding = nn.Sequential(model.embedding, nn.Softplus())  # nothing is 0 by itself
    kept = []
    model.attention.register_forward_pre_hook(lambda m, args: kept.append(float((args[0] != 0).float().mean())))
    image = draw(2, 100, 10)
    first, second = model(image).logits, model(image).logits
    assert abs(kept[0] - 0.75) < 5 * (0.25 * 0.75 / (200 * 512)) ** 0.5 and not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(image).logits, model(image).logits) and kept[-1] == 1


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_backend(extension, name):
    """A backend changes no parameter, and what is saved loads."""
    model, image = model_and_image(name)
    other = MODELS[name][0]()
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    assert all(torch.equal(a, b) for a, b in zip(MODELS[name][1](model, image), MODELS[name][1](other, image)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: AttentionMIL(0), ValueError, "image_dim must be at least 1"),
        (lambda: AttentionMIL(8, 0), ValueError, "num_classes must be at least 1"),
        (lambda: AttentionMIL(8, dropout=2), ValueError, "dropout must be from 0 to 1"),
        (lambda: AttentionMIL(8)(draw(2, 9, 7)), ValueError, "image must have shape"),
        (lambda: AttentionMIL(8)(draw(2, 9, 8), need_weights=2), TypeError, "need_weights must be a bool"),
        (lambda: ClamSB(8, num_samples=0), ValueError, "num_samples must be at least 1"),
        (lambda: ClamSB(8, dropout=-1), ValueError, "dropout must be from 0 to 1"),
        (lambda: ClamSB(8, subtyping=2), TypeError, "subtyping must be a bool"),
        (lambda: ClamSB(8)(draw(2, 9, 7)), ValueError, "image must have shape"),
        (lambda: ClamSB(8)(draw(9, 8), offsets=[0, 8]), ValueError, "offsets"),
        (lambda: ClamSB(8)(draw(2, 9, 8), mask=torch.ones(2, 8) > 0), ValueError, "mask must have shape"),
        (lambda: ClamSB(8)(draw(2, 9, 8), label=[0, 1]), TypeError, "label must be a torch.Tensor"),
        (lambda: ClamSB(8)(draw(2, 9, 8), label=torch.zeros(2)), TypeError, "label must be int64"),
        (lambda: ClamSB(8)(draw(2, 9, 8), label=LABEL), ValueError, "label must have shape"),
        (lambda: ClamSB(8)(draw(2, 9, 8), label=LABEL[1:3]), ValueError, "label must be from 0 to 1, got"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
