"""Every mistake in an argument has a message that names it, tells what came, and what was expected."""

import pytest
import torch

import mmkernels as mmk
from mmkernels import backends

IMAGE, TEXT = torch.randn(2, 6, 8), torch.randn(2, 8)
PLANES = torch.randn(2, 8, 2, 3)
ROWS = torch.randn(6, 8)
MASK = torch.ones(2, 6, dtype=torch.bool)


def offsets(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


# name: (arguments that differ from a valid call, exception, what the message must contain)
MISTAKES = {
    "image is a list": ({"image": [[1.0]]}, TypeError, ["image", "list", "torch.Tensor"]),
    "image is None": ({"image": None}, TypeError, ["image", "NoneType", "torch.Tensor"]),
    "image of integers": ({"image": IMAGE.long()}, ValueError, ["image", "torch.int64", "float32"]),
    "image of booleans": ({"image": IMAGE > 0}, ValueError, ["image", "torch.bool", "float32"]),
    "image complex": ({"image": IMAGE.to(torch.complex64)}, ValueError, ["image", "torch.complex64", "float32"]),
    "image sparse": ({"image": IMAGE.to_sparse()}, ValueError, ["image", "sparse", "dense"]),
    "image too flat": ({"image": IMAGE[0]}, ValueError, ["image", "[6, 8]", "[B, N, D]"]),
    "image too deep": ({"image": PLANES}, ValueError, ["image", "[2, 8, 2, 3]", "[B, N, D]"]),
    "image not bdhw": ({"layout": "bdhw"}, ValueError, ["image", "[2, 6, 8]", "[B, D, Y, X]"]),
    "image without channels": ({"image": IMAGE[..., :0], "text": TEXT[:, :0]}, ValueError, ["image", "channel", "[2, 6, 0]"]),
    "image not packed": ({"offsets": offsets(0, 1, 2)}, ValueError, ["image", "[rows, D]", "[2, 6, 8]"]),
    "text is a number": ({"text": 1.0}, TypeError, ["text", "float", "torch.Tensor"]),
    "text of integers": ({"text": TEXT.int()}, ValueError, ["text", "torch.int32", "float32"]),
    "text of another dtype": ({"text": TEXT.double()}, ValueError, ["text", "torch.float64", "image", "torch.float32"]),
    "text of a narrow dtype": ({"text": TEXT.half()}, ValueError, ["text", "torch.float16", "image", "torch.float32"]),
    "text on another device": ({"text": TEXT.to("meta")}, ValueError, ["text", "meta", "image", "cpu"]),
    "text of another batch": ({"text": TEXT[:1]}, ValueError, ["text", "[1, 8]", "2, 8"]),
    "text of other channels": ({"text": TEXT[:, :7]}, ValueError, ["text", "[2, 7]", "2, 8"]),
    "text with tokens": ({"text": TEXT[:, None]}, ValueError, ["text", "[2, 1, 8]", "2, 8"]),
    "mask is a list": ({"mask": [True]}, TypeError, ["mask", "list", "torch.Tensor"]),
    "mask of floats": ({"mask": MASK.float()}, ValueError, ["mask", "torch.float32", "bool"]),
    "mask of integers": ({"mask": MASK.to(torch.uint8)}, ValueError, ["mask", "torch.uint8", "bool"]),
    "mask of another length": ({"mask": MASK[:, :5]}, ValueError, ["mask", "[2, 5]", "2, 6"]),
    "mask of another batch": ({"mask": MASK[:1]}, ValueError, ["mask", "[1, 6]", "2, 6"]),
    "mask with heads": ({"mask": MASK[:, None]}, ValueError, ["mask", "[2, 1, 6]", "2, 6"]),
    "mask on another device": ({"mask": MASK.to("meta")}, ValueError, ["mask", "meta", "cpu"]),
    "mask not bdhw": ({"image": PLANES, "layout": "bdhw", "mask": MASK}, ValueError, ["mask", "[2, 6]", "2, 2, 3"]),
    "mask turned": ({"image": PLANES, "layout": "bdhw", "mask": MASK.view(2, 3, 2)}, ValueError, ["mask", "[2, 3, 2]", "2, 2, 3"]),
    "mask not packed": ({"image": ROWS, "offsets": offsets(0, 1, 6), "mask": MASK}, ValueError, ["mask", "[2, 6]", "rows"]),
    "offsets is a list": ({"image": ROWS, "offsets": [0, 6]}, TypeError, ["offsets", "list", "torch.Tensor"]),
    "offsets of floats": ({"image": ROWS, "offsets": offsets(0, 1, 6).float()}, ValueError, ["offsets", "torch.float32", "int32", "int64"]),
    "offsets of int16": ({"image": ROWS, "offsets": offsets(0, 1, 6, dtype=torch.int16)}, ValueError, ["offsets", "torch.int16", "int64"]),
    "offsets of two dimensions": ({"image": ROWS, "offsets": offsets(0, 1, 6)[None]}, ValueError, ["offsets", "[1, 3]", "B + 1"]),
    "offsets empty": ({"image": ROWS, "offsets": offsets()}, ValueError, ["offsets", "[0]", "B + 1"]),
    "offsets on another device": ({"image": ROWS, "offsets": offsets(0, 1, 6).to("meta")}, ValueError, ["offsets", "meta", "cpu"]),
    "offsets start late": ({"image": ROWS, "offsets": offsets(1, 2, 6)}, ValueError, ["offsets", "0", "got 1"]),
    "offsets start negative": ({"image": ROWS, "offsets": offsets(-1, 2, 6)}, ValueError, ["offsets", "0", "got -1"]),
    "offsets end early": ({"image": ROWS, "offsets": offsets(0, 2, 5)}, ValueError, ["offsets", "6", "got 5"]),
    "offsets end late": ({"image": ROWS, "offsets": offsets(0, 2, 7)}, ValueError, ["offsets", "6", "got 7"]),
    "offsets descend": ({"image": ROWS, "text": torch.randn(3, 8), "offsets": offsets(0, 4, 2, 6)}, ValueError, ["offsets", "ascend", "4", "2"]),
    "offsets out of range inside": ({"image": ROWS, "text": torch.randn(3, 8), "offsets": offsets(0, 99, 2, 6)}, ValueError, ["offsets", "ascend", "99"]),
    "offsets of another batch": ({"image": ROWS, "offsets": offsets(0, 6)}, ValueError, ["text", "[2, 8]", "1, 8"]),
    "offsets with bdhw": ({"image": PLANES, "layout": "bdhw", "offsets": offsets(0, 1, 2)}, ValueError, ["layout", "offsets", "bdhw"]),
    "scale is a string": ({"scale": "1"}, TypeError, ["scale", "str", "number"]),
    "scale is a bool": ({"scale": True}, TypeError, ["scale", "bool", "number"]),
    "scale is a tensor": ({"scale": torch.tensor(1.0)}, TypeError, ["scale", "Tensor", "number"]),
    "num_heads is a float": ({"num_heads": 2.0}, TypeError, ["num_heads", "float", "int"]),
    "num_heads is a bool": ({"num_heads": True}, TypeError, ["num_heads", "bool", "int"]),
    "num_heads is None": ({"num_heads": None}, TypeError, ["num_heads", "NoneType", "int"]),
    "num_heads zero": ({"num_heads": 0}, ValueError, ["num_heads", "0", "8"]),
    "num_heads negative": ({"num_heads": -2}, ValueError, ["num_heads", "-2", "8"]),
    "num_heads doesn't divide": ({"num_heads": 3}, ValueError, ["num_heads", "3", "8"]),
    "num_heads too many": ({"num_heads": 16}, ValueError, ["num_heads", "16", "8"]),
    "combine unknown": ({"combine": "add"}, ValueError, ["combine", "'add'", "'multiply'", "'pool'"]),
    "combine is None": ({"combine": None}, TypeError, ["combine", "NoneType", "str"]),
    "layout unknown": ({"layout": "bhwd"}, ValueError, ["layout", "'bhwd'", "'bnd'", "'bdhw'"]),
    "layout is a number": ({"layout": 3}, TypeError, ["layout", "int", "str"]),
    "rescale is a number": ({"rescale": 1}, TypeError, ["rescale", "int", "bool"]),
    "need_weights is a number": ({"need_weights": 1}, TypeError, ["need_weights", "int", "bool"]),
    "out is a list": ({"out": []}, TypeError, ["out", "list", "torch.Tensor"]),
    "out of another shape": ({"out": torch.empty(2, 8, 6)}, ValueError, ["out", "[2, 8, 6]", "[2, 6, 8]"]),
    "out of the pooled shape": ({"out": torch.empty(2, 8)}, ValueError, ["out", "[2, 8]", "[2, 6, 8]"]),
    "out of the image's shape": ({"combine": "pool", "out": torch.empty(2, 6, 8)}, ValueError, ["out", "[2, 6, 8]", "[2, 8]"]),
    "out of another dtype": ({"out": IMAGE.half()}, ValueError, ["out", "torch.float16", "torch.float32"]),
    "out on another device": ({"out": IMAGE.to("meta")}, ValueError, ["out", "meta", "cpu"]),
    "out overlaps itself": ({"out": torch.empty(2, 1, 8).expand(2, 6, 8)}, ValueError, ["out", "overlap", "itself"]),
    "out requires a gradient": ({"out": torch.zeros(2, 6, 8, requires_grad=True)}, ValueError, ["out", "inference", "gradient"]),
    "image requires a gradient": ({"image": IMAGE.clone().requires_grad_(), "out": torch.empty(2, 6, 8)}, ValueError, ["out", "inference", "gradient"]),
    "text requires a gradient": ({"text": TEXT.clone().requires_grad_(), "out": torch.empty(2, 6, 8)}, ValueError, ["out", "inference", "gradient"]),
    "backend is a number": ({"backend": 3}, TypeError, ["backend", "int", "str"]),
    "backend unknown": ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "'cpu'", "'cuda'", "'triton'", "'reference'"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message(name):
    changes, exception, parts = MISTAKES[name]
    with pytest.raises(exception) as caught:
        mmk.spatial_attention(**{"image": IMAGE, "text": TEXT} | changes)
    assert type(caught.value) is exception
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_the_call_that_the_mistakes_differ_from_is_valid():
    assert mmk.spatial_attention(IMAGE, TEXT).shape == IMAGE.shape


@pytest.mark.parametrize("backend", backends.names())
def test_mistakes_are_found_before_a_backend_is_chosen(backend):
    """The same message whatever was forced, and whether or not it can run."""
    with pytest.raises(ValueError, match="num_heads"):
        mmk.spatial_attention(IMAGE, TEXT, num_heads=3, backend=backend)


def test_out_overlaps_an_input():
    memory = torch.randn(4, 6, 8)
    with pytest.raises(ValueError, match="out must not overlap image"):
        mmk.spatial_attention(memory[:2], TEXT, out=memory[1:3])
    with pytest.raises(ValueError, match="out must not overlap image"):
        mmk.spatial_attention(memory[:2], TEXT, combine="pool", out=memory[0, :2])
    with pytest.raises(ValueError, match="out must not overlap text"):
        mmk.spatial_attention(IMAGE, memory[0, :2], out=memory[:2])


def test_out_under_no_grad():
    """A parameter may be an input where no gradient is recorded."""
    image = IMAGE.clone().requires_grad_()
    out = torch.empty(2, 6, 8)
    with torch.no_grad():
        assert mmk.spatial_attention(image, TEXT, out=out) is out
    assert torch.equal(out, mmk.spatial_attention(IMAGE, TEXT))


def test_positional_options_are_refused():
    with pytest.raises(TypeError):
        mmk.spatial_attention(IMAGE, TEXT, MASK)


@pytest.mark.parametrize("backend", [b for b in backends.names()
                                     if backends.why_not(b, "spatial_attention", "cpu", torch.float32) is not None])
def test_forced_backend_that_cannot_run(backend):
    with pytest.raises(mmk.BackendError) as caught:
        mmk.spatial_attention(IMAGE, TEXT, backend=backend)
    assert isinstance(caught.value, RuntimeError)
    lines = str(caught.value).splitlines()
    assert backend in lines[0] and "spatial_attention" in lines[0] and "cpu" in lines[0] and "float32" in lines[0]
    for name in backends.names():                 # each with its reason
        line = next(line for line in lines[1:] if line.strip().startswith(f"{name}:"))
        reason = backends.why_not(name, "spatial_attention", "cpu", torch.float32)
        assert line.strip() == f"{name}: {reason or 'can run'}".splitlines()[0]


def test_a_backend_that_refuses_is_never_replaced(monkeypatch):
    """A forced backend raises, and does not run another one, even where others can run."""
    monkeypatch.setitem(backends._reasons, "cpu", lambda device_type, dtype: "it is switched off by this test")
    with pytest.raises(mmk.BackendError, match="cpu: it is switched off by this test"):
        mmk.spatial_attention(IMAGE, TEXT, backend="cpu")
    assert mmk.spatial_attention(IMAGE, TEXT).shape == IMAGE.shape


# The registered operations don't trust their caller either: a RuntimeError, never a crash. (With any meta tensor among
# the arguments, PyTorch runs the operation's fake, which touches no memory.)

VALID = {"image": IMAGE, "text": TEXT, "mask": None, "offsets": None, "scale": 1.0, "num_heads": 1, "pool": False, "rescale": False}

WRONG = {
    "text too short": {"text": TEXT[:, :7]},
    "text of another batch": {"text": TEXT[:1]},
    "text of another dtype": {"text": TEXT.double()},
    "text a scalar": {"text": torch.tensor(1.0)},
    "image of integers": {"image": IMAGE.long(), "text": TEXT.long()},
    "image a vector": {"image": IMAGE[0, 0]},
    "image packed without offsets": {"image": ROWS},
    "image of five dimensions": {"image": PLANES[None]},
    "image without channels": {"image": IMAGE[..., :0], "text": TEXT[:, :0]},
    "mask too short": {"mask": MASK[:, :5]},
    "mask of floats": {"mask": MASK.float()},
    "mask flat": {"mask": MASK.flatten()},
    "num_heads zero": {"num_heads": 0},
    "num_heads negative": {"num_heads": -1},
    "num_heads doesn't divide": {"num_heads": 3},
    "offsets of int32": {"image": ROWS, "offsets": offsets(0, 1, 6, dtype=torch.int32)},
    "offsets empty": {"image": ROWS, "offsets": offsets()},
    "offsets descend": {"image": ROWS, "text": torch.randn(3, 8), "offsets": offsets(0, 5, 2, 6)},
    "offsets out of range": {"image": ROWS, "offsets": offsets(0, 2, 7)},
    "offsets far out of range": {"image": ROWS, "text": torch.randn(3, 8), "offsets": offsets(0, 2**40, 2**41, 6)},
    "offsets negative": {"image": ROWS, "offsets": offsets(-5, 2, 6)},
    "offsets of another batch": {"image": ROWS, "offsets": offsets(0, 6)},
    "offsets with a dense image": {"offsets": offsets(0, 1, 2)},
    "offsets strided": {"image": ROWS, "offsets": offsets(0, 9, 1, 9, 6, 9).view(3, 2)},
}


@pytest.mark.parametrize("name", WRONG)
def test_operation(extension, name):
    with pytest.raises(RuntimeError):
        torch.ops.mmkernels.spatial_attention(*(VALID | WRONG[name]).values())


@pytest.mark.parametrize("name", WRONG)
def test_operation_out(extension, name):
    arguments = VALID | WRONG[name]
    with pytest.raises(RuntimeError):
        torch.ops.mmkernels.spatial_attention_out(*arguments.values(), torch.empty_like(arguments["image"]))


@pytest.mark.parametrize("name", WRONG)
def test_operation_backward(extension, name):
    arguments = VALID | WRONG[name]
    weights = torch.rand(2, 1, 6) if arguments["offsets"] is None else torch.rand(1, 6)
    with pytest.raises(RuntimeError):
        torch.ops.mmkernels.spatial_attention_backward(
            torch.ones_like(arguments["image"]), None, arguments["image"], arguments["text"], weights,
            *list(arguments.values())[2:], True, True)


@pytest.mark.parametrize("out", [torch.empty(2, 6, 7), torch.empty(2, 5, 8), torch.empty(12, 8), torch.empty(0),
                                 torch.empty(2, 6, 8, dtype=torch.float64)],
                         ids=lambda t: f"{list(t.shape)} {t.dtype}")
def test_operation_with_a_wrong_out(extension, out):
    with pytest.raises(RuntimeError):
        torch.ops.mmkernels.spatial_attention_out(*VALID.values(), out)


WRONG_GRADIENTS = {
    "grad_result too short": (torch.ones(2, 6, 7), None, torch.rand(2, 1, 6)),
    "grad_result of another dtype": (IMAGE.double(), None, torch.rand(2, 1, 6)),
    "grad_result pooled": (TEXT, None, torch.rand(2, 1, 6)),
    "grad_weights too short": (None, torch.ones(2, 1, 5), torch.rand(2, 1, 6)),
    "grad_weights of another dtype": (None, torch.ones(2, 1, 6).half(), torch.rand(2, 1, 6)),
    "weights too short": (IMAGE, None, torch.rand(2, 1, 5)),
    "weights of two heads": (IMAGE, None, torch.rand(2, 2, 6)),
    "weights of another dtype": (IMAGE, None, torch.rand(2, 1, 6).double()),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_operation_backward_with_wrong_gradients(extension, name):
    grad_result, grad_weights, weights = WRONG_GRADIENTS[name]
    with pytest.raises(RuntimeError):
        torch.ops.mmkernels.spatial_attention_backward(grad_result, grad_weights, IMAGE, TEXT, weights,
                                                       *list(VALID.values())[2:], True, True)


def test_operation_backward_without_any_gradient(extension):
    """Both may be None: the gradients are zeros then, or it is refused, but nothing is read."""
    image_grad, text_grad = torch.ops.mmkernels.spatial_attention_backward(
        None, None, IMAGE, TEXT, torch.rand(2, 1, 6), *list(VALID.values())[2:], True, True)
    assert image_grad.shape == IMAGE.shape and not image_grad.any() and not text_grad.any()
