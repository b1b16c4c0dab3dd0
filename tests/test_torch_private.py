"""PyTorch's private names stand in one file, and do there what the comment beside each says."""

import re

import pytest
import torch
from support.compiling import ROOT
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from mmkernels import torch_private

PRIVATE = re.compile(
    r"\b(?:torch|nn|forward_ad)(?:\.\w+)*\._[a-z]\w*|\b_(?:forward|backward)\w*_hooks\b|\b_dynamo_\w+", re.IGNORECASE
)


def test_symbolic():
    """Asked in each call of a patched module, where PyTorch's own function would warn."""
    warned = torch.fx._symbolic_trace.is_fx_tracing_warning
    warned.cache_clear()
    seen = []
    traced = torch.fx.symbolic_trace(lambda tensor: seen.append(torch_private.symbolic((1, tensor))) or tensor + 1)
    assert seen == [True]
    assert not torch_private.symbolic((traced(torch.ones(2)),))
    assert warned.cache_info().currsize == 0


def test_private_names_stand_in_one_file():
    files = {str(path): path.read_text() for path in (ROOT / "mmkernels").rglob("*.py")}
    assert len(PRIVATE.findall(files.pop(str(ROOT / "mmkernels/torch_private.py")))) >= 10
    found = {name: names for name, text in files.items() if (names := PRIVATE.findall(text))}
    assert not found, found


def test_transforms():
    seen = []

    def look(tensor):
        seen.append((torch_private.transforms_active(), torch_private.is_transformed(tensor)))
        return tensor

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    assert seen == [(False, False), (True, True)]


def test_forward_mode():
    assert not torch_private.in_dual_level()
    with forward_ad.dual_level():
        assert torch_private.in_dual_level() and torch_private.forward_mode_enabled()


def test_traced():
    seen = []

    def look(tensor):
        seen.append(torch_private.traces_operations())
        return tensor + 1

    look(torch.ones(2))
    make_fx(look)(torch.ones(2))
    assert seen == [False, True]
    with FakeTensorMode():
        assert type(torch.ones(2)) in torch_private.TRACED


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "before": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "before backward": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "every module's": lambda module: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind):
    module = torch.nn.Linear(2, 2)
    handle = HOOKS[kind](module)
    try:
        assert torch_private.has_hooks(module)
    finally:
        handle.remove()
    assert not torch_private.has_hooks(module)
