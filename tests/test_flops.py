"""PyTorch's counter of floating point operations: it counts ours, and what it counts is what runs without it."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from support.calls import VARIANTS, function_of, tensors_of
from support.projections import KINDS, kernels_of, with_gradients
from test_absorb import IMAGE_MASK, computed, inputs, made
from test_absorb import KINDS as ABSORBING
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import mmkernels as mmk


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def training(function, tensors, wanted=lambda i: True):
    """Forward and backward, for gradients of those tensors whose number is wanted."""
    leaves = [t.detach().requires_grad_(t.is_floating_point() and wanted(i)) for i, t in enumerate(tensors)]
    results = [r for r in function(*leaves) if r.requires_grad]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])


@pytest.mark.parametrize("name", VARIANTS)
def test_operations(extension, name):
    """As the definition's products, which autograd differentiates; for all gradients, and for some."""
    ours, plain = (function_of(name, mmk, backend=backend) for backend in ("cpu", "reference"))
    tensors = tensors_of(name, torch.float32)
    expected = counted(plain, *tensors)
    assert counted(ours, *tensors) == expected
    assert expected or VARIANTS[name].operation in ("deformable_attention", "spatial_attention")
    for wanted in (lambda i: True, lambda i: i == 0, lambda i: i == 1):
        found = counted(training, ours, tensors, wanted)
        assert found == counted(training, plain, tensors, wanted) >= expected


def test_out(extension):
    image, text = torch.randn(2, 6, 8), torch.randn(2, 8)
    for combine, out in (("multiply", torch.empty(2, 6, 8)), ("pool", torch.empty(2, 8))):
        found = counted(lambda: mmk.spatial_attention(image, text, combine=combine, out=out))
        assert found == counted(lambda: mmk.spatial_attention(image, text, combine=combine)) > 0


def test_without_values(extension):
    """Sizes are enough, as for PyTorch's own."""
    with FakeTensorMode():
        query, key = torch.empty(2, 4, 1000, 64), torch.empty(2, 4, 77, 64)
        assert counted(mmk.gated_cross_attention, query, key, key) == 2 * 2 * 2 * 4 * 1000 * 77 * 64


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_modules(extension, kind):
    """Modules run what they run uncounted, to the bit, and count as their plain PyTorch."""
    module, tensors = kind.module(), kind.inputs()
    kernels, found = kernels_of(kind.call, module, *tensors), with_gradients(kind.call, module, tensors)
    with FlopCounterMode(display=False) as counter:
        assert kernels_of(kind.call, module, *tensors) == kernels
    with counter:  # counts on
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(kind.call, module, tensors), found))
    module.backend = "reference"
    assert counter.get_total_flops() == counted(with_gradients, kind.call, module, tensors)


@pytest.mark.parametrize("kind", ABSORBING)
def test_absorbing_modules(extension, kind):
    """Absorbed as without a counter, also where that is demanded."""
    tensors = inputs(kind)
    for absorb in (None, True, False):
        module = made(kind, absorb=absorb)
        kernels = kernels_of(module, *tensors)
        with FlopCounterMode(display=False):
            assert kernels_of(module, *tensors) == kernels
        module.backend, plain = "cpu", made(kind, absorb=absorb, backend="reference")
        assert counted(computed, module, tensors) == counted(computed, plain, tensors)


class Names(ModuleTracker):
    """One that does more than note which module runs."""

    def _fw_post_hook(self, module, given, result):
        super()._fw_post_hook(module, given, result)
        self.seen.append(module)


def test_other_global_hooks(extension):
    """They see the projections called, beside a counter, too."""
    module = mmk.AttentionPooling(8, 2)
    image = torch.randn(3, 6, 8)
    for other in (Names(), FlopCounterMode(display=False)):
        seen = other.seen = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(other)
            if not isinstance(other, Names):
                hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
                stack.callback(hook.remove)
            module(image, image_mask=IMAGE_MASK[:, :6])
        assert any(m is module.key_projection for m in seen)
    assert kernels_of(module, image) == ["mmkernels::absorbed_attention"]


COUNT = """
import sys, torch
{first}
import torch.utils.flop_counter, mmkernels
assert "mmkernels.triton" not in sys.modules
image, text = torch.randn(2, 6, 8), torch.randn(2, 8)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    mmkernels.spatial_attention(image, text, combine="pool", backend={backend!r})
assert counter.get_total_flops() == 4 * 2 * 6 * 8, counter.flop_counts
"""


@pytest.mark.parametrize("first, backend", [("import mmkernels", "cpu"), ("", "triton")])
def test_whatever_is_imported_first(extension, first, backend):
    """And where the first counted call loads the backend."""
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = COUNT.format(first=first, backend=backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
