"""Adding an operation takes what docs/adding-an-operation.md says, no edit elsewhere: one schema, a reference, what it
returns, and kernels. Here two small ones, with kernels in Python: one that keeps something for backward, and one with a
single result of a single tensor, which PyTorch passes bare."""

from collections import namedtuple

import pytest
import torch
from torch.library import opcheck

from mmkernels import backends
from mmkernels.ops.operation import Operation

Toy = namedtuple("Toy", ("operation", "kernel", "backward_kernel", "rest"))  # rest: arguments without gradients


def weigh(image, text, scale):
    return (scale * image * text[:, None]).softmax(-1)


def masked(image, mask):
    return image if mask is None else image * mask[..., None]


def attend(image, text, mask, scale):
    """``image * softmax_d(scale * image * text)``, where the mask says so."""
    return (masked(image * weigh(image, text, scale), mask),)


def kernel(image, text, mask, scale):
    weights = weigh(image, text, scale)
    return masked(image * weights, mask), weights


def backward_kernel(grad_result, image, text, mask, weights, scale, need_image_grad, need_text_grad):
    grad = masked(grad_result, mask)
    through = weights * (grad * image - (grad * image * weights).sum(-1, keepdim=True)) * scale
    return (
        grad * weights + through * text[:, None] if need_image_grad else image.new_empty(0),
        (through * image).sum(1) if need_text_grad else image.new_empty(0),
    )


PAIR = Toy(
    Operation(
        "toy_attention",
        "(Tensor image, Tensor text, Tensor? mask, float scale) -> (Tensor result, Tensor weights)",
        differentiable=("image", "text"),
        extras=("weights",),
        kept=("weights",),
        reference=attend,
        fake=lambda image, text, mask, scale: (torch.empty_like(image), torch.empty_like(image)),
        fake_grad=lambda name, tensor: torch.empty_like(tensor),
    ),
    kernel,
    backward_kernel,
    (torch.tensor([[True, True, False], [False] * 3]), 0.5),
)


def attend_self(image, scale):
    """``image * softmax_d(scale * image)``"""
    return (image * (scale * image).softmax(-1),)


def self_kernel(image, scale):
    return image * (scale * image).softmax(-1)


def self_backward_kernel(grad_result, image, scale, need_image_grad):
    weights = (scale * image).softmax(-1)
    grad = grad_result * image
    return grad_result * weights + scale * weights * (grad - (grad * weights).sum(-1, keepdim=True))


ALONE = Toy(
    Operation(
        "toy_self_attention",
        "(Tensor image, float scale) -> (Tensor result)",
        differentiable=("image",),
        extras=(),
        kept=(),
        reference=attend_self,
        fake=lambda image, scale: (torch.empty_like(image),),
        fake_grad=lambda name, tensor: torch.empty_like(tensor),
    ),
    self_kernel,
    self_backward_kernel,
    (0.5,),
)


@pytest.fixture(scope="module", params=[PAIR, ALONE], ids=lambda toy: toy.operation.name)
def toy(request):
    toy = request.param
    name = toy.operation.name
    library = torch.library.Library("mmkernels", "FRAGMENT")
    library.define(toy.operation.schema.forward(name))
    library.define(toy.operation.schema.backward(name))
    library.impl(name, toy.kernel, "CPU")
    library.impl(f"{name}_backward", toy.backward_kernel, "CPU")
    toy.operation.register(name, "cpu")
    yield toy
    backends.forget(name)
    library._destroy()


@pytest.fixture
def run(toy):
    """The toy's public function."""
    name = toy.operation.name
    return lambda *tensors, backend=None: backends.choose(name, tensors[0], backend)(*tensors, *toy.rest)[0]


@pytest.fixture
def tensors(toy):
    draw = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 4), (2, 4))[: len(toy.operation.differentiable)]
    return [torch.randn(size, dtype=torch.float64, generator=draw).requires_grad_() for size in sizes]


def test_the_fastest_backend_runs_it(toy, run, tensors):
    assert backends.choose(toy.operation.name, tensors[0]).backend == "cpu"
    torch.testing.assert_close(run(*tensors), run(*tensors, backend="reference"))


def test_derivatives(run, tensors):
    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_transforms(run, tensors):
    image, *text = (t.detach() for t in tensors)
    images = torch.stack([image, 2 * image])
    expected = torch.stack([run(each, *text) for each in images])
    torch.testing.assert_close(torch.func.vmap(lambda i: run(i, *text))(images), expected)
    gradient = torch.func.grad(lambda i: run(i, *text).sum())
    torch.testing.assert_close(gradient(image), torch.autograd.grad(run(*tensors).sum(), tensors[0])[0])
    expected = torch.stack([gradient(each) for each in images])
    torch.testing.assert_close(torch.func.vmap(gradient)(images), expected)


def test_compiled(run, tensors):
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), run(*tensors))
    gradients = (torch.autograd.grad(each(*tensors).sum(), tensors) for each in (compiled, run))
    torch.testing.assert_close(*gradients)


def test_registered_functions(toy, tensors):
    opcheck(getattr(torch.ops.mmkernels, toy.operation.name).default, (*tensors, *toy.rest))
