"""spatial_attention(out=...): what is written into has changed, as PyTorch sees it; and views that negate."""

import functools

import pytest
import torch
from support.attention_tests import assert_computes, call, draw, negative
from support.runnable import runnable

import mmkernels as mmk
from mmkernels import backends

OPERATION = "spatial_attention"
BAGS = torch.tensor([0, 3, 3, 8])

# image's shape, text's, options of the public function
FORMS = {
    "multiply": ((2, 4, 6), (2, 6), {}),
    "pool": ((2, 4, 6), (2, 6), {"combine": "pool"}),
    "bdhw": ((2, 6, 2, 2), (2, 6), {"layout": "bdhw"}),
    "packed": ((8, 6), (3, 6), {"offsets": BAGS}),
    "packed pool": ((8, 6), (3, 6), {"offsets": BAGS, "combine": "pool"}),
}
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
in_every_form = pytest.mark.parametrize("form", FORMS)


def arguments_of(form, device):
    """image, text, options, and a tensor like the result."""
    shape, text_shape, options = FORMS[form]
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    image = draw(*shape, device=device)
    text = draw(*text_shape, device=device, seed=1)
    return image, text, options, torch.full_like(text if options.get("combine") == "pool" else image, 3)


def public(image, text, options, out, backend):
    mmk.spatial_attention(image, text, out=out, backend=backend, **options)


def registered(image, text, options, out, backend):
    run = backends.choose("spatial_attention", image, backend)
    run.into(image, text, None, options.get("offsets"), 6**-0.5, 1, options.get("combine") == "pool", False, out)


def compiled(*arguments):
    torch._dynamo.reset()
    torch.compile(public, fullgraph=True, backend="aot_eager")(*arguments)


WRITERS = {"public": public, "registered": registered, "compiled": compiled}


@pytest.mark.property("out=")
@on_every_backend
@in_every_form
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("inference", [False, True])
def test_counts_as_a_change(backend, device, dtype, form, write, inference):
    """What was saved for a backward pass and then written into makes that pass an error, not a wrong gradient."""
    image, text, options, out = arguments_of(form, device)
    weight = torch.ones_like(out, requires_grad=True)
    product, view = weight * out, out[:1]
    with torch.inference_mode(inference):
        write(image, text, options, out, backend)
    assert out._version > 0 and view._version == out._version
    assert_computes(functools.partial(call, **options), OPERATION, backend, (image, text), found=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.property("out=")
@on_every_backend
@pytest.mark.parametrize("form", ["multiply", "bdhw", "packed"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_in_place_counts_as_a_change(backend, device, dtype, form, write):
    image, text, options, _ = arguments_of(form, device)
    product = torch.ones_like(image, requires_grad=True) * image
    write(image, text, options, image, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.property("out=", "inference mode")
@on_every_backend
@pytest.mark.parametrize("write", [public, registered])
def test_inference_tensors(backend, device, dtype, write):
    """They have no version to count, alone or beside others that have."""
    image, text, options, _ = arguments_of("multiply", device)
    expected = mmk.spatial_attention(image, text, backend=backend)
    with torch.inference_mode():
        out = torch.empty_like(image)
        write(image, text, options, out, backend)
        assert torch.equal(out, expected)
        write(image.clone(), text.clone(), options, out, backend)
        assert torch.equal(out, expected)


@on_every_backend
def test_registered_operation_has_no_derivative(backend, device, dtype):
    if backend == "reference":
        pytest.skip("not a registered operation")
    image, text, options, out = arguments_of("multiply", device)
    with pytest.raises(RuntimeError, match="for inference only"):
        registered(image.requires_grad_(), text, options, out, backend)
    assert bool((out == 3).all())


@pytest.mark.property("out=", "negative views")
@on_every_backend
@in_every_form
def test_negative_views_are_refused(backend, device, dtype, form):
    image, text, options, out = arguments_of(form, device)
    out = negative(out)
    with pytest.raises(ValueError, match="out must not be a negative view"):
        public(image, text, options, out, backend)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="out must not be a negative view"):
            registered(image, text, options, out, backend)
    assert bool((out == 3).all())


@on_every_backend
def test_beside_negative_views(backend, device, dtype):
    """Inputs may be negative views where something is written, too."""
    image, text, options, out = arguments_of("multiply", device)
    expected = mmk.spatial_attention(image, text, backend=backend)
    for write in (public, registered):
        out.fill_(3)
        write(negative(image), negative(text), options, out, backend)
        assert torch.equal(out, expected)
