"""Keras layers on its torch backend: against Keras's own layers, built symbolically, trained, saved and loaded."""

import inspect
import os
import runpy
import sys

import pytest
import torch
from support.attention_tests import assert_rule, draw

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
from mmkernels.integrations.keras import ChannelAttention, SpatialAttention  # noqa: E402

layers = keras.layers
IMAGES = {
    "channels_last": ("channels_last", (5, 4, 8)),
    "channels_first": ("channels_first", (8, 5, 4)),
    "sequence": (None, (7, 8)),
}


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def spatial_of_keras(layer, image, text, mask=None):
    """The layers that one SpatialAttention is in place of, of its parameters: (result, weights)."""
    first = layer.data_format == "channels_first" and len(image.shape) == 4
    rows = torch.movedim(image, 1, -1) if first else image
    flat = rows.flatten(1, -2).unflatten(-1, (layer.num_heads, -1))
    dense = layers.Dense(layer.text_projection.units, dtype=str(image.dtype).removeprefix("torch."))
    dense.build(text.shape)
    dense.set_weights([w.to(image.dtype) for w in parameters(layer)])
    projected = dense(text).unflatten(-1, (layer.num_heads, -1))
    scale = flat.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    scores = torch.einsum("bnhd,bhd->bnh", flat, projected) * scale
    mask = torch.ones(scores.shape[:2], dtype=torch.bool) if mask is None else mask.flatten(1)
    weights = scores.masked_fill(~mask[..., None], -1e9).softmax(1)
    if layer.rescale:
        weights = weights * mask.sum(1)[:, None, None]
    seen = (flat * weights[..., None]).flatten(2)
    if layer.combine == "pool":
        return seen.sum(1), weights.mT
    seen = seen.view(rows.shape)
    return torch.movedim(seen, -1, 1) if first else seen, weights.mT


def channel_of_keras(layer, image, text, mask=None):
    """Concatenate, Dense, softmax and Multiply, of a ChannelAttention's parameters: (result, weights)."""
    first = layer.data_format == "channels_first" and len(image.shape) == 4
    rows = torch.movedim(image, 1, -1) if first else image
    dense = layers.Dense(layer.bias.shape[0], dtype=str(image.dtype).removeprefix("torch."))
    beside = text.reshape(len(text), *[1] * (rows.dim() - 2), -1).expand(*rows.shape[:-1], -1)
    joined = layers.Concatenate()([rows, beside])
    dense.build(joined.shape)
    dense.set_weights([w.to(image.dtype) for w in parameters(layer)])
    weights = dense(joined).softmax(-1)
    back = lambda tensor: torch.movedim(tensor, -1, 1) if first else tensor
    return back(rows * weights), back(weights)


def parameters(layer):
    return [variable.value.detach() for variable in layer.trainable_variables]


OF_KERAS = {SpatialAttention: spatial_of_keras, ChannelAttention: channel_of_keras}


def assert_is_keras(layer, image, text, mask=None):
    """Results and weights of the layer, and gradients of its inputs, are those of Keras's own layers."""

    def run(function, dtype):
        tensors = [t.to(dtype).requires_grad_() for t in (image, text)]
        results = function(*tensors)
        upstream = [draw(*r.shape, seed=9 + i).to(r.dtype) for i, r in enumerate(results)]
        return *results, *torch.autograd.grad(results, tensors, upstream)

    plain = lambda *tensors: OF_KERAS[type(layer)](layer, *tensors, mask=mask)
    found = run(lambda *tensors: layer(list(tensors), mask=mask, need_weights=True), image.dtype)
    peer = [p.to(f.dtype) for p, f in zip(run(plain, image.dtype), found)]
    assert_rule(found, truth=run(plain, torch.float64), peer=peer, batch=len(image))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(
    "options", [{}, {"combine": "pool", "num_heads": 2}, {"rescale": True, "scale": 1.0}], ids=["", "pool", "rescale"]
)
def test_spatial_attention_is_three_layers_of_keras(kind, options):
    data_format, shape = IMAGES[kind]
    layer = SpatialAttention(**options, data_format=data_format, bias_initializer="random_normal")
    image, text = draw(3, *shape), draw(3, 6, seed=1)
    assert_is_keras(layer, image, text)
    positions = shape[1:] if kind == "channels_first" else shape[:-1]
    mask = draw(3, *positions, seed=2) > 0
    assert_is_keras(layer, image, text, mask)
    result = layer([image, text])
    assert torch.equal(result, layer([image, text], need_weights=True)[0])
    assert result.shape == layer.compute_output_shape([image.shape, text.shape])


@pytest.mark.parametrize("kind", [*IMAGES, "vector"])
def test_channel_attention_is_four_layers_of_keras(kind):
    data_format, shape = IMAGES.get(kind, (None, (8,)))
    layer = ChannelAttention(data_format=data_format, bias_initializer="random_normal")
    image, text = draw(3, *shape), draw(3, 6, seed=1)
    assert_is_keras(layer, image, text)
    result = layer([image, text])
    assert torch.equal(result, layer([image, text], need_weights=True)[0])
    assert result.shape == layer.compute_output_shape([image.shape, text.shape])


@pytest.mark.parametrize("layer", [SpatialAttention, ChannelAttention])
def test_without_a_bias(layer):
    layer = layer(use_bias=False)
    layer.build([(None, 7, 8), (None, 6)])
    assert len(layer.trainable_variables) == 1
    assert layer([draw(2, 7, 8), draw(2, 6)]).shape == (2, 7, 8)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", [SpatialAttention, ChannelAttention])
def test_dtype_policies(kind, policy):
    """Parameters in the variables' dtype, results in that of computation; gradients reach float32 parameters."""
    layer = kind(dtype=policy)
    computed = keras.dtype_policies.get(policy).compute_dtype
    result, weights = layer([draw(2, 5, 4, 8), draw(2, 6)], need_weights=True)
    assert keras.backend.standardize_dtype(result.dtype) == computed
    symbolic = layer([keras.Input((5, 4, 8)), keras.Input((6,))], need_weights=True)
    assert [keras.backend.standardize_dtype(t.dtype) for t in (result, weights)] == [t.dtype for t in symbolic]
    result.float().sum().backward()
    for variable in layer.trainable_variables:
        assert keras.backend.standardize_dtype(variable.dtype) == keras.dtype_policies.get(policy).variable_dtype
        assert variable.value.grad is None or variable.value.grad.isfinite().all()
    assert layer.trainable_variables[0].value.grad is not None


@pytest.mark.parametrize(
    "layer, image, expected",
    [
        (lambda: SpatialAttention(), (None, None, 8), [(2, None, None, 8), (2, 1, None)]),
        (lambda: SpatialAttention(2, "pool"), (5, 4, 8), [(2, 8), (2, 2, 20)]),
        (lambda: SpatialAttention(2, data_format="channels_first"), (8, 5, 4), [(2, 8, 5, 4), (2, 2, 20)]),
        (lambda: ChannelAttention(), (5, None, 8), [(2, 5, None, 8), (2, 5, None, 8)]),
    ],
)
def test_symbolic_shapes(layer, image, expected):
    """Built on what isn't known yet."""
    found = layer()([keras.Input(image, batch_size=2), keras.Input((6,), batch_size=2)], need_weights=True)
    assert [tensor.shape for tensor in found] == expected


def test_masks_of_keras():
    """A Masking layer's mask tells which positions take part, and goes on with what is still a sequence."""
    image = draw(3, 7, 8)
    image[:, 5:] = 0
    text = draw(3, 6, seed=1)
    masked = layers.Masking()(image)
    mask = torch.arange(7).expand(3, 7) < 5
    multiply = SpatialAttention()
    found = multiply([masked, text])
    assert torch.equal(found, multiply([image, text], mask=mask))
    assert torch.equal(found._keras_mask, mask)
    assert not torch.equal(found, multiply([image, text]))
    assert not hasattr(SpatialAttention(combine="pool")([masked, text]), "_keras_mask")
    assert torch.equal(ChannelAttention()([masked, text])._keras_mask, mask)
    with pytest.raises(ValueError, match="text's mask must be None"):
        multiply([masked, text], mask=[mask, mask])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_trains_saves_and_loads(kind, masked, tmp_path):
    """In a functional model, with fit; what is loaded has the same parameters and gives the same bits."""
    image, text = keras.Input((6, 6, 3)), keras.Input((4,))
    mask = keras.Input((6, 6), dtype="bool")
    features = layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    if kind == "spatial":
        options = {"mask": mask} if masked else {}
        pooled = SpatialAttention(2, "pool", scale=2.0, bias_initializer="random_normal")([features, text], **options)
    else:
        weighed = ChannelAttention(kernel_initializer="he_normal")([features, text])
        pooled = layers.GlobalAveragePooling2D()(weighed)
    inputs = [image, text, mask] if masked and kind == "spatial" else [image, text]
    model = keras.Model(inputs, layers.Dense(1)(pooled))
    data = [draw(32, 6, 6, 3), draw(32, 4, seed=1), draw(32, 6, 6, seed=2) > 0][: len(inputs)]
    label = data[0].mean((1, 2, 3)) * 10
    model.compile("adam", "mse")
    before = model.get_weights()
    losses = model.fit(data, label, epochs=3, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all((old != new).any() for old, new in zip(before, model.get_weights()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert all((old == new).all() for old, new in zip(model.get_weights(), loaded.get_weights(), strict=True))
    assert (model.predict(data, verbose=0) == loaded.predict(data, verbose=0)).all()
    config = [layer.get_config() for layer in model.layers]
    assert config == [layer.get_config() for layer in loaded.layers]


@pytest.mark.parametrize("kind", [SpatialAttention, ChannelAttention])
def test_every_option_is_kept(kind):
    """By name, none at its default."""
    options = {
        "num_heads": 2,
        "combine": "pool",
        "rescale": True,
        "scale": 0.25,
        "use_bias": False,
        "kernel_initializer": "he_normal",
        "bias_initializer": "ones",
        "data_format": "channels_first",
        "backend": "reference",
    }
    of_class = inspect.signature(kind).parameters.keys() - {"options"}
    assert of_class <= options.keys()
    layer = kind(**{name: options[name] for name in of_class}, name="mine", dtype="mixed_bfloat16")
    config = layer.get_config()
    assert kind.from_config(config).get_config() == config
    assert config["name"] == "mine"
    for name in of_class:
        kept = config[name]
        if name.endswith("initializer"):
            assert type(keras.initializers.get(kept)) is type(keras.initializers.get(options[name]))
        else:
            assert kept == options[name]


def test_the_projection_may_change():
    """Keras's LoRA of the text's projection takes effect, and is what trains."""
    layer = SpatialAttention()
    image, text = draw(3, 7, 8), draw(3, 6, seed=1)
    before = layer([image, text])
    layer.text_projection.enable_lora(2)
    assert torch.equal(layer([image, text]), before)  # it begins as 0
    layer.text_projection.lora_kernel_b.assign(draw(2, 8, seed=2))
    assert not torch.equal(layer([image, text]), before)
    assert len(layer.trainable_variables) == 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SpatialAttention()(draw(2, 7, 8)), "must be called on a list"),
        (lambda: SpatialAttention()([draw(2, 8), draw(2, 6)]), "image must be .B, N, D"),
        (lambda: ChannelAttention()([draw(2, 7, 8), draw(2, 3, 6)]), "text must be .B, E"),
        (lambda: ChannelAttention()([keras.Input((7, None)), keras.Input((6,))]), "image must have a known number"),
        (lambda: SpatialAttention(3)([draw(2, 7, 8), draw(2, 6)]), "num_heads must be at least 1 and divide"),
        (lambda: SpatialAttention(combine="sum"), "combine must be one of"),
        (lambda: SpatialAttention(data_format="last"), "data_format must be one of"),
        (lambda: SpatialAttention(backend="gpu"), "backend must be"),
        (lambda: SpatialAttention()([draw(2, 7, 8), draw(2, 6)], mask=draw(2, 7)), "mask must be bool"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="needs Keras's torch backend, got 'jax': set KERAS_BACKEND=torch"):
        runpy.run_module("mmkernels.integrations.keras")


def test_without_keras_or_its_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match="needs keras 3 on its torch backend .KERAS_BACKEND=torch"):
        runpy.run_module("mmkernels.integrations.keras")
