"""Hugging Face's kernelize puts our layers into transformers' models, without the Hub."""

import copy
import importlib

import pytest
import torch
from support.attention_tests import assert_rule, draw, gradients

from mmkernels.integrations.kernels import LAYERS, Repository, mapping, register

kernels = pytest.importorskip("kernels")
pytest.importorskip("transformers")
from kernels.layer import globals as kernels_globals  # noqa: E402
from kernels.layer import repos  # noqa: E402

NAME = "MultiScaleDeformableAttention"
INFERENCE = kernels.Mode.INFERENCE
# Those of transformers whose files have the class.
MODELS = (
    "deformable_detr",
    "grounding_dino",
    "lw_detr",
    "mm_grounding_dino",
    "omdet_turbo",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "rf_detr",
    "rt_detr",
)
SHAPES = [(5, 4), (3, 2)]


@pytest.fixture
def layer(request, monkeypatch):
    """transformers' class as `kernelize` finds it: named, for the test alone."""
    model = getattr(request, "param", "rt_detr")
    found = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), NAME)
    monkeypatch.setattr(found, "kernel_layer_name", NAME, raising=False)
    monkeypatch.setattr(found, "kernel_condition", staticmethod(lambda module: True), raising=False)
    return found


@pytest.fixture
def empty_mapping():
    """No other layer than those that a test registers."""
    token = kernels_globals._KERNEL_MAPPING.set({})
    yield
    kernels_globals._KERNEL_MAPPING.reset(token)


def ours(module):
    return getattr(module.forward, "__func__", None) is LAYERS[NAME].forward


def kernelized(model, mode=INFERENCE, device="cpu"):
    with kernels.use_kernel_mapping(mapping(), inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, device=device, use_fallback=False)


def tensors(dtype=torch.float32, batch=2, queries=7, heads=2, width=8, points=3):
    """value, sampling locations (some of them outside), attention weights"""
    positions = sum(y * x for y, x in SHAPES)
    weights = draw(batch, queries, heads, len(SHAPES) * points, seed=2).softmax(-1)
    return (
        draw(batch, positions, heads, width, dtype=dtype),
        (draw(batch, queries, heads, len(SHAPES), points, 2, seed=1) * 0.4 + 0.5).to(dtype),
        weights.unflatten(-1, (len(SHAPES), points)).to(dtype),
    )


def call(layer, value, locations, weights):
    sizes = torch.tensor(SHAPES)
    starts = torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]])
    return layer(value, sizes, SHAPES, starts, locations, weights, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", MODELS, indirect=True)
def test_transformers_layer(layer, dtype):
    """Results and gradients of the kernelized layer are those of its own code."""
    plain = layer()
    found = kernelized(layer(), kernels.Mode.TRAINING)
    assert ours(found) and not ours(plain)
    given = tensors(dtype)
    truth = gradients(lambda *t: call(plain, *t), [t.double() for t in given])
    peer = gradients(lambda *t: call(plain, *t), given)
    assert_rule(gradients(lambda *t: call(found, *t), given), truth, peer, batch=len(given[0]))


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "compiled"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_mode_and_device(layer, mode, device, monkeypatch):
    """No fallback to the class's own forward where `kernelize` is asked for it."""
    monkeypatch.setattr(repos, "_find_capability", lambda: 90)  # it asks for the GPU's
    mode = INFERENCE | kernels.Mode.TORCH_COMPILE if mode == "compiled" else kernels.Mode[mode]
    assert ours(kernelized(torch.nn.Sequential(layer()), mode, device)[0])


def test_compiled_in_one_graph(layer):
    found = kernelized(layer(), INFERENCE | kernels.Mode.TORCH_COMPILE)
    given = tensors()
    compiled = torch.compile(lambda *t: call(found, *t), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), call(found, *given))


def test_a_model_of_transformers(layer):
    """All of a model's layers are found; its parameters stay, and so does the class."""
    from transformers import RTDetrConfig
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrMultiscaleDeformableAttention

    config = RTDetrConfig(d_model=16, num_feature_levels=len(SHAPES))
    torch.manual_seed(0)
    plain = RTDetrMultiscaleDeformableAttention(config, num_heads=2, n_points=3).eval()
    forward = layer.forward
    found = kernelized(copy.deepcopy(plain))
    assert ours(found.attn) and layer.forward is forward
    assert plain.state_dict().keys() == found.state_dict().keys()
    assert ours(copy.deepcopy(found).attn)

    def run(model, hidden, image, reference):
        sizes = torch.tensor(SHAPES)
        return model(
            hidden_states=hidden,
            encoder_hidden_states=image,
            reference_points=reference,
            spatial_shapes=sizes,
            spatial_shapes_list=SHAPES,
            level_start_index=torch.tensor([0, 20]),
        )[0]

    given = draw(2, 7, 16), draw(2, 26, 16, seed=1), draw(2, 7, len(SHAPES), 2, seed=2).sigmoid()
    truth = gradients(lambda *t: run(copy.deepcopy(plain).double(), *t), [t.double() for t in given])
    assert_rule(
        gradients(lambda *t: run(found, *t), given), truth, gradients(lambda *t: run(plain, *t), given), batch=2
    )


def test_registered_for_all(layer, empty_mapping):
    register()
    assert ours(kernels.kernelize(layer(), mode=INFERENCE, device="cpu", use_fallback=False))


def test_a_class_that_is_prepared_by_hand(empty_mapping):
    """As the documentation has it, for a class that has no name yet."""

    class Layer(torch.nn.Module):
        def forward(self, value, sizes, sizes_list, starts, locations, weights, step):
            raise AssertionError("replaced")

    kernels.replace_kernel_forward_from_hub(Layer, NAME)
    found = kernelized(Layer())
    assert call(found, *tensors()).shape == (2, 7, 16)


def test_repositories_are_values():
    """`kernels` copies its mappings, and keeps what it loaded by repository."""
    repository = Repository(NAME)
    assert copy.deepcopy(repository) == repository == Repository(layer_name=NAME)
    assert len({repository, Repository(NAME)}) == 1
    assert repository.load() is LAYERS[NAME]
    assert str(repository) == f"`mmkernels`, layer `{NAME}`"


def test_an_unknown_layer_is_named():
    with pytest.raises(ValueError, match="layer_name must be one of .'MultiScaleDeformableAttention'., got 'RMSNorm'"):
        Repository("RMSNorm")
