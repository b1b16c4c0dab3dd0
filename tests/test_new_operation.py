"""Adding an operation takes what docs/adding-an-operation.md says, no edit elsewhere: one schema, a reference, what it
returns, and kernels. Here a small one, with kernels in Python."""

import pytest
import torch
from torch.library import opcheck

from mmkernels import backends
from mmkernels.ops.operation import Operation

NAME = "toy_attention"


def attend(image, text, mask, scale):
    """``image * softmax_d(scale * image * text)``, where the mask says so."""
    weights = (scale * image * text[:, None]).softmax(-1)
    part = 1 if mask is None else mask[..., None].to(image.dtype)
    return (image * weights * part,)


def fake(image, text, mask, scale):
    return torch.empty_like(image), torch.empty_like(image)


OPERATION = Operation(
    NAME,
    "(Tensor image, Tensor text, Tensor? mask, float scale) -> (Tensor result, Tensor weights)",
    differentiable=("image", "text"),
    extras=("weights",),
    kept=("weights",),
    keep=lambda inputs, produced: (produced.weights,),
    reference=attend,
    fake=fake,
    fake_grad=lambda name, tensor: torch.empty_like(tensor),
)


def kernel(image, text, mask, scale):
    weights = (scale * image * text[:, None]).softmax(-1)
    return image * weights * (1 if mask is None else mask[..., None]), weights


def backward_kernel(grad_result, image, text, mask, weights, scale, need_image_grad, need_text_grad):
    grad = grad_result * (1 if mask is None else mask[..., None])
    through = weights * (grad * image - (grad * image * weights).sum(-1, keepdim=True)) * scale
    return (
        grad * weights + through * text[:, None] if need_image_grad else image.new_empty(0),
        (through * image).sum(1) if need_text_grad else image.new_empty(0),
    )


@pytest.fixture(scope="module")
def toy():
    library = torch.library.Library("mmkernels", "FRAGMENT")
    library.define(OPERATION.schema.forward(NAME))
    library.define(OPERATION.schema.backward(NAME))
    library.impl(NAME, kernel, "CPU")
    library.impl(f"{NAME}_backward", backward_kernel, "CPU")
    OPERATION.register(NAME, "cpu")
    yield lambda image, text, mask=None, scale=0.5, backend=None: backends.choose(NAME, image, backend)(
        image, text, mask, scale
    )[0]
    backends.forget(NAME)
    library._destroy()


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    sizes = (2, 3, 4), (2, 4)
    return [torch.randn(size, dtype=torch.float64, generator=draw).requires_grad_() for size in sizes]


def test_the_fastest_backend_runs_it(toy, tensors):
    assert backends.choose(NAME, tensors[0]).backend == "cpu"
    torch.testing.assert_close(toy(*tensors), toy(*tensors, backend="reference"))


def test_derivatives(toy, tensors):
    mask = torch.tensor([[True, True, False], [False] * 3])
    assert torch.autograd.gradcheck(lambda *t: toy(*t, mask), tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: toy(*t, mask), tensors)


def test_transforms(toy, tensors):
    image, text = (t.detach() for t in tensors)
    images = torch.stack([image, 2 * image])
    expected = torch.stack([toy(each, text) for each in images])
    torch.testing.assert_close(torch.func.vmap(toy, (0, None))(images, text), expected)
    gradient = torch.func.grad(lambda i: toy(i, text).sum())(image)
    torch.testing.assert_close(gradient, torch.autograd.grad(toy(*tensors).sum(), tensors[0])[0])


def test_compiled(toy, tensors):
    compiled = torch.compile(toy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), toy(*tensors))
    gradients = (torch.autograd.grad(run(*tensors).sum(), tensors) for run in (compiled, toy))
    torch.testing.assert_close(*gradients)


def test_registered_functions(toy, tensors):
    opcheck(torch.ops.mmkernels.toy_attention.default, (*tensors, None, 0.5))
