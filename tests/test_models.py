"""The article's model: shapes, padding, the fused layer against the plain one."""

import pytest
import torch
from support.attention_tests import assert_module, assert_rule

from mmkernels.data import Batch
from mmkernels.models import ImageTextModel
from mmkernels.training import step


def build(backend=None, seed=0, **options):
    torch.manual_seed(seed)
    return ImageTextModel(100, backend=backend, **options)


def batch(count=2, size=64, length=5, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, size, size, generator=draw), torch.randint(1, 100, (count, length), generator=draw))


def test_shapes_of_the_article():
    model = build()
    image, text = batch(size=224)
    assert model.image_encoder(image).shape == (2, 64, 54, 54)
    assert model.encode_text(text).shape == (2, 128)
    assert model.fusion.text_projection(model.encode_text(text)).shape == (2, 64)
    assert model(image, text).shape == (2,)
    assert model.attention(image, text).shape == (2, 54, 54)
    assert ImageTextModel().embedding.weight.shape == (10_000, 128)


def test_predict_gives_probabilities():
    model, (image, text) = build(), batch()
    probability = model.predict(image, text)
    assert not probability.requires_grad
    assert ((probability > 0) & (probability < 1)).all()
    assert_module(lambda m, *inputs: m(*inputs).sigmoid(), model, (image, text), found=probability)


@pytest.mark.parametrize("combine", ["pool", "multiply"])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_is_what_the_prediction_was_made_with(combine, num_heads):
    """Weights sum to 1, are not uniform, and with one head pool the features to exactly what is classified."""
    model = build(combine=combine, num_heads=num_heads)
    image, text = batch()
    with torch.no_grad():
        model.fusion.text_projection.weight.mul_(30)
    weights = model.attention(image, text)
    assert_rule(weights.sum((1, 2)), truth=torch.ones(2, dtype=torch.float64), peer=torch.ones(2))
    assert weights.std() > 1e-4
    if num_heads == 1:

        def prediction(model, image, text):
            pooled = torch.einsum("byx,bdyx->bd", model.attention(image, text), model.image_encoder(image))
            return model.classifier(pooled)[:, 0]

        assert_module(prediction, model, (image, text))
        assert_module(prediction, model, (image, text), found=model(image, text))


def test_pool_is_multiply_and_mean():
    inputs = batch()
    pooled = build(combine="pool")(*inputs)
    assert_module(ImageTextModel.__call__, build(combine="multiply"), inputs, found=pooled)


def test_several_texts_an_image():
    model, (image, text) = build(), batch(count=6)
    texts, image = text.view(2, 3, -1), image[:2]
    one_by_one = lambda m, image, texts: torch.stack([m(image, texts[:, k]) for k in range(3)], 1)
    assert_module(one_by_one, model, (image, texts), found=model(image, texts))
    assert model.attention(image, texts).shape == (2, 3, 14, 14)


@pytest.mark.parametrize("where", ["end", "start", "between"])
def test_padding_never_changes_a_result(where):
    model, (image, text) = build(), batch()
    text[1, 3:] = 0
    zero = torch.zeros_like(text)
    padded = {
        "end": torch.cat([text, zero], 1),
        "start": torch.cat([zero, text], 1),
        "between": torch.stack([text, zero], 2).flatten(1),
    }[where]
    assert torch.equal(model(image, padded), model(image, text))
    assert_module(ImageTextModel.__call__, model, (image[1:], text[1:, :3]), found=model(image, padded)[1:])


def test_empty_text_is_the_initial_state():
    model, (image, text) = build(), batch()
    nothing = text[:, :0]
    assert torch.equal(model.encode_text(nothing), torch.zeros(2, 128))
    assert torch.equal(model(image, nothing), model(image, torch.zeros_like(text)))
    text[0] = 0
    assert torch.equal(model.encode_text(text)[0], torch.zeros(128))
    model(image, nothing).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_text_order_matters():
    """Else the LSTM would be a bag of words, and the padding tests could not fail."""
    model, (_, text) = build(), batch()
    assert (model.encode_text(text) - model.encode_text(text.flip(1))).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"combine": "multiply"}, {"num_heads": 4}])
def test_fused_and_plain_train_alike(options):
    """Same seed, same data: the same losses step by step, and they fall."""
    image, text = batch(count=4)
    label = torch.tensor([1.0, 0.0, 1.0, 0.0])

    def losses(backend, dtype):
        model = build(backend, **options).to(dtype=dtype, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        inputs = {"image": image.to(dtype), "text": text}
        return torch.tensor([step(model, optimizer, Batch(inputs, label.to(dtype)))[1] for _ in range(8)], dtype=dtype)

    fused = losses(None, torch.float32)
    assert_rule(fused, truth=losses("reference", torch.float64), peer=losses("reference", torch.float32))
    assert fused[-1] < fused[0]


def test_same_seed_same_parameters():
    for one, other in zip(build(None).parameters(), build("reference").parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "image, text, error, named",
    [
        (torch.zeros(2, 1, 32, 32), torch.ones(2, 3, dtype=torch.int64), ValueError, "image"),
        (torch.zeros(2, 3, 8, 32), torch.ones(2, 3, dtype=torch.int64), ValueError, "image"),
        (torch.zeros(2, 3, 32, 32), torch.ones(3, 3, dtype=torch.int64), ValueError, "text"),
        (torch.zeros(2, 3, 32, 32), torch.ones(2, 3), TypeError, "text"),
        (torch.zeros(2, 3, 32, 32), "a cat", TypeError, "text"),
    ],
)
def test_mistakes_are_named(image, text, error, named):
    with pytest.raises(error, match=named):
        build()(image, text)
