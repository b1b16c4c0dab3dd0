"""How PyTorch sees Triton's operations: compiled, refused, and not imported before they are needed."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.triton_tests import draw, interpreted

import mmkernels as mmk
from mmkernels import backends

OPERATION = "spatial_attention"
both_ways = pytest.mark.parametrize("combine", ["multiply", "pool"])
run = functools.partial(mmk.spatial_attention, backend="triton", need_weights=True)


def in_own_process(*command, **environment):
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), **environment},
    )


FIRST_USE = """
import sys, torch, mmkernels as mmk
image, text = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4)
run = lambda i, t: mmk.spatial_attention(i, t, backend="triton")
result = torch.compile(run, fullgraph=True, backend="aot_eager")(image, text)
result.sum().backward()
assert torch.equal(result, run(image, text))
"""


@pytest.mark.slow
def test_first_use_is_compiled():
    """torch.compile of one graph brings the module, too."""
    done = in_own_process("-c", FIRST_USE, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@interpreted
@pytest.mark.skipif(backends.extension is None, reason="the C++ operations aren't built")
@pytest.mark.parametrize("suffix", ["", "_out", "_backward"])
def test_schema_is_that_of_the_other_backends(suffix):
    mmk.spatial_attention(draw(1, 1, 1), draw(1, 1), backend="triton")
    schema = lambda name: str(getattr(torch.ops.mmkernels, name + suffix).default._schema).replace(name, OPERATION)
    assert schema(f"{OPERATION}_triton") == schema(OPERATION)


@pytest.mark.property("opcheck", "opcheck backward", backend="triton")
@interpreted
@pytest.mark.slow
@both_ways
def test_opcheck(combine):
    image = draw(2, 7, 6).requires_grad_()
    text = draw(2, 6, seed=1).requires_grad_()
    options = (draw(2, 7) > 0, None, 0.5, 2, combine == "pool", True)
    run(image, text)  # brings the operations
    operations = torch.ops.mmkernels
    torch.library.opcheck(operations.spatial_attention_triton.default, (image, text, *options))
    result, weights = operations.spatial_attention_triton(image.detach(), text.detach(), *options)
    torch.library.opcheck(
        operations.spatial_attention_triton_out.default, (image.detach(), text.detach(), *options, result)
    )
    torch.library.opcheck(
        operations.spatial_attention_triton_backward.default,
        (result, weights, image, text, *options[:2], weights, *options[2:], True, True),
    )


@pytest.mark.property("mistakes of a kernel's caller", backend="triton")
@interpreted
@pytest.mark.parametrize(
    "name, value",
    [
        ("text", torch.zeros(2, 5)),
        ("mask", torch.ones(2, 8, dtype=torch.bool)),
        ("num_heads", 4),
        ("offsets", torch.tensor([0, 7])),
    ],
)
def test_operation_refuses_what_would_not_be_safe(name, value):
    run(draw(1, 1, 1), draw(1, 1))
    arguments = {
        "image": draw(2, 7, 6),
        "text": draw(2, 6),
        "mask": None,
        "offsets": None,
        "scale": 1.0,
        "num_heads": 1,
        "pool": False,
        "rescale": False,
        name: value,
    }
    with pytest.raises(RuntimeError, match="text|mask|num_heads|image"):
        torch.ops.mmkernels.spatial_attention_triton(**arguments)


@interpreted
def test_interpreter_runs_by_name_only(own_backends):
    image = torch.empty(1)
    assert backends.choose(OPERATION, image) is not backends.choose(OPERATION, image, "triton")
    backends.register("cpu", lambda device_type, dtype: "not built")
    assert backends.choose(OPERATION, image) is backends.choose(OPERATION, image, "reference")


@interpreted
def test_float64_is_refused():
    with pytest.raises(mmk.BackendError, match="triton: it has no float64"):
        run(draw(1, 3, 2).double(), draw(1, 2).double())


HIDE = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""
CODE = """
import sys, torch, mmkernels as mmk
image, text = torch.randn(1, 3, 2), torch.randn(1, 2)
mmk.spatial_attention(image, text)
assert "mmkernels.triton" not in sys.modules and "triton" not in sys.modules, "triton was imported"
try:
    mmk.spatial_attention(image, text, backend="triton")
except mmk.BackendError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "hide, reason",
    [("", "TRITON_INTERPRET=1"), (HIDE, "pip install mmkernels[triton]")],
    ids=["there", "not installed"],
)
def test_triton_is_imported_only_when_needed(hide, reason):
    done = in_own_process("-c", hide + CODE, TRITON_INTERPRET="0")
    assert done.returncode == 0 and reason in done.stdout, done.stdout + done.stderr


@interpreted
def test_backward_refuses_absent_weights():
    image = torch.randn(2, 5, 8)
    text = torch.randn(2, 8)
    mmk.spatial_attention(image, text, backend="triton")
    with pytest.raises(RuntimeError, match="weights"):
        torch.ops.mmkernels.spatial_attention_triton_backward(
            image, None, image, text, None, None, None, 1.0, 1, False, False, True, True
        )
