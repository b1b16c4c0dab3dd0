"""What the CPU's forward pass of channel and additive attention keeps of the first rows, so that backward needn't
compute it again."""

import pytest
import torch
from support.attention_tests import assert_computes

import mmkernels as mmk
from mmkernels.ops import common


def draw(*shape, dtype=torch.float32):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=torch.float64).to(
            dtype
        )
        * 0.3
    )


def channel(dtype, batch=2, positions=300, channels=20):
    return {
        "image": draw(batch, positions, channels, dtype=dtype),
        "text": draw(batch, 5, dtype=dtype),
        "weight": draw(channels, channels + 5, dtype=dtype),
        "bias": draw(channels, dtype=dtype),
    }


def additive(dtype, batch=2, positions=300, channels=24, hidden=20, gated=False):
    layers = {"w_image": (hidden, channels), "v": (2, hidden)} | (
        {"w_gate": (hidden, channels), "bias_gate": (hidden,)} if gated else {}
    )
    return {"image": draw(batch, positions, channels, dtype=dtype), "query": None, "w_query": None} | {
        name: draw(*shape, dtype=dtype) for name, shape in layers.items()
    }


# operation, its arguments, numbers kept a row
CALLS = {
    "channel": (mmk.channel_attention, channel, 20),
    "additive": (mmk.additive_attention, additive, 20),
    "gated": (mmk.additive_attention, lambda dtype, **shape: additive(dtype, gated=True, **shape), 40),
}
on_every_call = pytest.mark.parametrize("function, arguments, columns", CALLS.values(), ids=CALLS)


# Who holds the constant: whether the image wants a gradient decides.
LIMITS = {True: "KEPT_BYTES", False: "KEPT_BYTES_WITHOUT_IMAGE_GRAD"}
with_and_without_image_grad = pytest.mark.parametrize("image_grad", LIMITS, ids=["image gradient", "no image gradient"])


def leaves(arguments, image_grad=True):
    leaf = lambda name, t: None if t is None else t.detach().requires_grad_(name != "image" or image_grad)
    return {name: leaf(name, t) for name, t in arguments.items()}


def differentiable(tensors):
    return [t for t in tensors.values() if t is not None and t.requires_grad]


def kept(result):
    """The rows that the operation's node keeps, of all."""
    node = result.grad_fn
    while "attention" not in node.name().lower():
        node = node.next_functions[0][0]
    return next(len(t) for t in node.saved_tensors[::-1] if t is not None)


@on_every_call
@with_and_without_image_grad
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_bit_changes(extension, monkeypatch, dtype, image_grad, function, arguments, columns):
    """None, some that end within a tile, and all: what backward finds is what it would compute."""
    found, rows = [], []
    for limit in (0, 250, 10**6):
        monkeypatch.setattr(common, LIMITS[image_grad], limit * columns * (8 if dtype == torch.float64 else 4))
        tensors = leaves(arguments(dtype), image_grad)
        result = function(**tensors, backend="cpu")
        rows.append(kept(result))
        found.append(torch.autograd.grad(result.float().square().sum(), differentiable(tensors)))
    assert rows == [0, 250, 600]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@on_every_call
def test_only_for_a_backward_pass(extension, monkeypatch, function, arguments, columns):
    asked = []
    original = common.kept_rows

    def count(*given):
        asked.append(original(*given))
        return asked[-1]

    monkeypatch.setattr(f"mmkernels.ops.{function.__name__}.kept_rows", count)
    plain = arguments(torch.float32)
    tensors = leaves(arguments(torch.float32))
    function(**plain), function(**tensors)
    with torch.no_grad():
        function(**tensors)
    function(**tensors, backend="reference")
    torch.func.grad(lambda image: function(**(plain | {"image": image})).sum())(plain["image"])
    torch.func.vmap(lambda image: function(**(tensors | {"image": image})))(plain["image"][None])
    assert asked == [0, 600, 0, 0, 0, 0]


@pytest.mark.property("bounded memory")
@on_every_call
@with_and_without_image_grad
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_memory_is_bounded(extension, monkeypatch, function, arguments, columns, image_grad, limit):
    """Beside results and gradients training allocates no memory that grows with the rows, but the weights."""
    monkeypatch.setattr(common, LIMITS[image_grad], limit)
    tensors = leaves(arguments(torch.float32, positions=40_000), image_grad)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = function(**tensors)
        torch.autograd.grad(result, differentiable(tensors)[0], torch.ones_like(result))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    gradient = tensors["image"].nbytes if image_grad else 0
    known = 2 * result.nbytes + gradient + 80_000 * 2 * 4  # result, ones, gradient, weights
    assert allocated < known + limit + 400_000, (allocated, known)


@on_every_call
def test_an_exported_graph_keeps_none(extension, function, arguments, columns):
    """It may run anywhere, and has no backward pass."""
    absent = {"query": None, "w_query": None} if function is mmk.additive_attention else {}

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ParameterDict(
                {name: t for name, t in arguments(torch.float32).items() if t is not None and name != "image"}
            )

        def forward(self, image):
            return function(image=image, **self.layers, **absent)

    layer = Layer()
    image = draw(2, 7, 20 if function is mmk.channel_attention else 24)
    exported = torch.export.export(layer, (image,))
    node = next(n for n in exported.graph.nodes if "mmkernels" in str(n.target))
    assert node.args[-1] == 0, node.args
    names, tensors = zip(*layer.layers.items())
    call = lambda operation, image, *layers: operation(image=image, **dict(zip(names, layers)), **absent)
    assert_computes(call, function.__name__, None, [image, *tensors], found=exported.module()(image))
