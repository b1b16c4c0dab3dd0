"""Published models, written out with our operations: against plain PyTorch of the same parameters."""

import copy
import itertools

import pytest
import torch
from support.attention_tests import assert_rule, draw
from torch import nn
from torch.nn import functional as F

from mmkernels import tolerance
from mmkernels.models import LanguageGate, PixelWordAttention, StackedAttentionNetwork, TopDownCaptioner


def masked_softmax(scores, mask):
    return scores.masked_fill(~mask, -1e9 if scores.dtype != torch.float16 else -1e4).softmax(-1)


def instance_norm(rows):
    """[B, N, C], over N, as nn.InstanceNorm1d has it"""
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    return (rows - mean) * (variance + 1e-5).rsqrt()


def pixel_word_attention(model, image, text, *, mask):
    """As LAVT's published code: scores are written, the words' side is multiplied by the mask."""
    heads = lambda tensor: tensor.unflatten(-1, (model.num_heads, -1)).transpose(1, 2)
    seen = mask[..., None].to(image.dtype)
    query = heads(instance_norm(model.query_projection(image)))
    key, value = (heads(p(text) * seen) for p in (model.key_projection, model.value_projection))
    scores = query @ key.mT * image.shape[-1] ** -0.5
    attended = (masked_softmax(scores, mask[:, None, None]) @ value).transpose(1, 2).flatten(2)
    words = instance_norm(model.out_projection(attended))
    return F.gelu(model.result_projection(F.gelu(model.image_projection(image)) * words))


def stacked_attention(model, image, query, *, mask):
    """(logits, weights) by equations 15 to 22"""
    features = model.image_projection(image).tanh()
    maps = []
    for layer in model.layers:
        hidden = (layer.image_projection(features) + layer.query_projection(query)[:, None]).tanh()
        weights = masked_softmax(layer.score_projection(hidden)[..., 0], mask)
        query = query + (weights[..., None] * features).sum(1)
        maps.append(weights)
    return model.classifier(query), torch.stack(maps, 1)


def top_down(model, image, text, *, mask):
    """(logits, weights), the image's projection computed once for all words"""
    mean = (image * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    projected = model.image_projection(image)
    zero = image.new_zeros(len(image), model.hidden)
    attention = language = zero, zero
    logits, maps = [], []
    for t in range(text.shape[1]):
        given = torch.cat([language[0], mean, model.embedding(text[:, t])], 1)
        attention = model.attention_lstm(given, attention)
        hidden = (projected + model.query_projection(attention[0])[:, None]).tanh()
        weights = masked_softmax(model.score_projection(hidden)[..., 0], mask)
        seen = torch.einsum("bn,bnd->bd", weights, image)
        language = model.language_lstm(torch.cat([seen, attention[0]], 1), language)
        logits.append(model.classifier(language[0]))
        maps.append(weights)
    return torch.stack(logits, 1), torch.stack(maps, 1)


def seeded(model, *sizes, **options):
    torch.manual_seed(0)
    return model(*sizes, **options)


# (model, plain version, inputs, size of what is masked, whether it gives weights, too)
MODELS = {
    "pixel-word": (
        lambda: seeded(PixelWordAttention, 16, 12),
        pixel_word_attention,
        lambda: (draw(3, 11, 16), draw(3, 6, 12, seed=1)),
        6,
        False,
    ),
    "pixel-word, heads": (
        lambda: seeded(PixelWordAttention, 16, 12, 4),
        pixel_word_attention,
        lambda: (draw(3, 11, 16), draw(3, 6, 12, seed=1)),
        6,
        False,
    ),
    "stacked": (
        lambda: seeded(StackedAttentionNetwork, 12, 16, 5, hidden_dim=20, num_layers=3),
        stacked_attention,
        lambda: (draw(3, 11, 12), draw(3, 16, seed=1)),
        11,
        True,
    ),
    "top-down": (
        lambda: seeded(TopDownCaptioner, 30, 24, embedding=10, hidden=14, attention=12),
        top_down,
        lambda: (draw(3, 9, 24), torch.randint(30, (3, 4), generator=torch.Generator().manual_seed(0))),
        9,
        True,
    ),
}


def mask_of(positions):
    """What takes part differs from sample to sample. Half at least: where few words do, all pixels attend alike, and
    the norm over them divides rounding by the root of its epsilon."""
    return torch.arange(positions) < torch.tensor([[positions], [positions * 2 // 3], [positions // 2]])


def everything(function, model, inputs, dtype):
    """Results, and gradients of inputs and parameters."""
    model = copy.deepcopy(model).to(dtype)
    inputs = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    results = function(model, *inputs)
    results = results if isinstance(results, tuple) else (results,)
    leaves = [t for t in (*inputs, *model.parameters()) if t.requires_grad]
    upstream = [draw(*r.shape, seed=9 + i).to(r.dtype) for i, r in enumerate(results)]
    grads = torch.autograd.grad(results, leaves, upstream, allow_unused=True, materialize_grads=True)
    return *results, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, masked, dtype):
    make, plain, inputs, length, has_weights = MODELS[name]
    model, inputs = make(), [t.to(dtype) if t.is_floating_point() else t for t in inputs()]
    model = model.to(dtype)
    mask = mask_of(length) if masked else torch.ones(3, length, dtype=torch.bool)
    options = {"need_weights": True} if has_weights else {}
    ours = lambda m, *t: m(*t, mask=mask if masked else None, **options)
    theirs = lambda m, *t: plain(m, *t, mask=mask)
    found = everything(ours, model, inputs, dtype)
    truth = everything(theirs, model, inputs, torch.float64)
    peer = [p.to(f.dtype) for p, f in zip(everything(theirs, model, inputs, dtype), found)]
    # A bias that a norm or a softmax takes away has no gradient: what rounds there is judged in float32 alone.
    kept = [dtype == torch.float32 or t.abs().max() > tolerance.CANCELLED for t in truth]
    assert sum(kept) >= len(kept) - 4
    assert_rule(*(list(itertools.compress(each, kept)) for each in (found, truth, peer)), batch=3)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_reaches_nothing(name):
    """NaN there changes no bit of results and gradients, those of parameters included."""
    make, _, inputs, length, _ = MODELS[name]
    model, inputs = make(), inputs()
    mask = mask_of(length)
    which = 1 if name.startswith("pixel") else 0
    poisoned = list(inputs)
    poisoned[which] = inputs[which].masked_fill(~mask[..., None], float("nan"))
    run = lambda m, *t: m(*t, mask=mask)
    clean = everything(run, model, inputs, torch.float32)
    for one, other in zip(clean, everything(run, model, poisoned, torch.float32)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_takes_part(name):
    """Finite, and no gradient for what is masked."""
    make, _, inputs, length, _ = MODELS[name]
    model, inputs = make(), inputs()
    mask = torch.zeros(3, length, dtype=torch.bool)
    found = everything(lambda m, *t: m(*t, mask=mask), model, inputs, torch.float32)
    assert all(t.isfinite().all() for t in found)
    which = 1 if name.startswith("pixel") else 0
    assert not found[1 + which].any()


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast(name):
    make, plain, inputs, length, has_weights = MODELS[name]
    model, inputs = make(), inputs()
    mask = mask_of(length)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = model(*inputs, mask=mask)
        peer = plain(model, *inputs, mask=mask)
    truth = plain(
        copy.deepcopy(model).double(), *(t.double() if t.is_floating_point() else t for t in inputs), mask=mask
    )
    peer, truth = ((each[0] if has_weights else each).detach() for each in (peer, truth))
    assert_rule(found, truth, peer.to(found.dtype), batch=3)


def test_one_head_projects_words_where_more_project_pixels():
    """The same numbers with `out` on either side of the attention."""
    model = seeded(PixelWordAttention, 8, 6)
    rows = []
    model.out_projection.register_forward_hook(lambda m, given, result: rows.append(given[0].shape[1]))
    model(draw(2, 9, 8), draw(2, 4, 6))
    assert rows == [4]


def test_dropout_in_training_only():
    model = seeded(PixelWordAttention, 8, 6, dropout=0.5)
    image, text = draw(2, 9, 8), draw(2, 4, 6)
    assert (model(image, text) == 0).any()
    assert (model.eval()(image, text) != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_language_gate(dtype):
    model = seeded(LanguageGate, 8).to(dtype)
    first, second = (part.weight for part in model.gate if isinstance(part, nn.Linear))
    image, fused = draw(2, 9, 8).to(dtype), draw(2, 9, 8, seed=1).to(dtype)

    def plain(m, image, fused):
        first, second = (part.weight for part in m.gate if isinstance(part, nn.Linear))
        return image + ((fused @ first.T).relu() @ second.T).tanh() * fused

    run = lambda function, dtype: everything(function, model, (image, fused), dtype)
    assert_rule(run(lambda m, *t: m(*t), dtype), run(plain, torch.float64), run(plain, dtype), batch=2)


def test_generated_words_are_the_likeliest():
    """Word after word, what forward predicts of all words before."""
    model = MODELS["top-down"][0]()
    image, mask = draw(3, 9, 24), mask_of(9)
    words = model.generate(image, 2, 5, mask=mask)
    given = torch.cat([torch.full((3, 1), 2), words[:, :-1]], 1)
    assert torch.equal(words, model(image, given, mask=mask).argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_backend(name):
    """A backend changes no parameter, and what is saved loads."""
    model = MODELS[name][0]()
    other = MODELS[name][0]()
    other.load_state_dict(model.state_dict())
    inputs = MODELS[name][2]()
    assert torch.equal(model(*inputs), other(*inputs))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: PixelWordAttention(8, 6, 3), ValueError, "num_heads must be at least 1 and divide image_dim = 8"),
        (lambda: PixelWordAttention(8, 6)(draw(2, 9, 7), draw(2, 4, 6)), ValueError, "image must have shape"),
        (lambda: PixelWordAttention(8, 6)(draw(2, 9, 8), draw(3, 4, 6)), ValueError, "text must have shape"),
        (
            lambda: PixelWordAttention(8, 6)(draw(2, 9, 8), draw(2, 4, 6), mask=torch.ones(2, 4)),
            ValueError,
            "mask must be bool",
        ),
        (lambda: LanguageGate(8)(draw(2, 9, 8), draw(2, 8, 8)), ValueError, "fused must have shape"),
        (lambda: LanguageGate(0), ValueError, "image_dim must be at least 1"),
        (lambda: StackedAttentionNetwork(8, 6, 0), ValueError, "num_answers must be at least 1"),
        (lambda: StackedAttentionNetwork(8, 6, 5)(draw(2, 9, 8), draw(2, 5)), ValueError, "query must have shape"),
        (
            lambda: TopDownCaptioner(9, 8, hidden=5, embedding=4)(draw(2, 9, 8), draw(2, 5)),
            TypeError,
            "text must hold words' numbers",
        ),
        (
            lambda: TopDownCaptioner(9, 8, hidden=5, embedding=4)(draw(2, 9, 8), torch.ones(2, 0, dtype=torch.int64)),
            ValueError,
            "text must hold at least one word",
        ),
        (
            lambda: TopDownCaptioner(9, 8, hidden=5, embedding=4).generate(draw(2, 9, 8), 1, 0),
            ValueError,
            "length must be at least 1",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
