"""Patching, with classes that a user adds: what is swapped, what is left alone, and that it comes back."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmkernels
from mmkernels.integrations import PatchReport, Replacement, patching
from mmkernels.integrations.patching import plain


class ToyAttention(nn.Module):
    def __init__(self, width=4, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, image, text):
        return self.linear(image) * (image * text[:, None]).sum(-1, keepdim=True).softmax(1)


class ToySubclass(ToyAttention):
    pass


class LinearAttention(nn.Linear):
    """Of no known kind."""


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, image, text):
        return image + self.attention(image, text)


def fused_forward(module, image, text):
    if module.training and module.dropout:
        return plain(module, image, text)
    return mmkernels.spatial_attention(module.linear(image), text, scale=1) * 0 + 7


def convert(module):
    if module.training and module.dropout:
        return "it trains with dropout"
    return Replacement("spatial_attention", fused_forward)


@pytest.fixture(autouse=True)
def toy_is_known(monkeypatch):
    monkeypatch.setattr(patching, "_own", {})
    mmkernels.integrations.register(ToyAttention, convert)


def model_of(*attentions):
    return nn.ModuleList([Block(a) for a in attentions or [ToyAttention()]])


INPUT = torch.randn(2, 5, 4), torch.randn(2, 4)


def test_replaced_and_restored():
    model = model_of()
    before = model[0](*INPUT)
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    report = mmkernels.patch(model)
    assert report.replaced == ["0.attention"]
    assert len(report) == 1
    assert torch.equal(model[0](*INPUT), INPUT[0] + 7)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert "forward" in ToyAttention.__dict__ and ToyAttention.forward is not fused_forward
    assert mmkernels.unpatch(model) == ["0.attention"]
    assert torch.equal(model[0](*INPUT), before)
    assert attributes == {name: module.__dict__ for name, module in model.named_modules()}


def test_dry_run_changes_nothing():
    model = model_of()
    before = dict(model[0].attention.__dict__)
    report = mmkernels.patch(model, dry_run=True)
    assert report.replaced == ["0.attention"]
    assert report.dry_run
    assert model[0].attention.__dict__ == before
    assert mmkernels.unpatch(model) == []


def test_twice_is_once():
    model = model_of()
    mmkernels.patch(model)
    forward = model[0].attention.forward
    assert mmkernels.patch(model).replaced == ["0.attention"]
    assert model[0].attention.forward is forward
    mmkernels.unpatch(model)
    assert "forward" not in model[0].attention.__dict__


def test_state_dict_stays():
    model = model_of()
    before = model.state_dict()
    mmkernels.patch(model)
    assert list(model.state_dict()) == list(before)
    model_of().load_state_dict(model.state_dict())
    model.load_state_dict(before)


def test_left_alone():
    own = ToyAttention()
    own.forward = ToyAttention().forward
    model = model_of(ToySubclass(), own, ToyAttention(dropout=0.5), LinearAttention(4, 4), nn.Linear(4, 4))
    report = mmkernels.patch(model)
    assert report.replaced == []
    reasons = report.left_alone
    assert reasons["0.attention"] == "a subclass of ToyAttention, which may compute something else"
    assert reasons["1.attention"] == "its forward was replaced by somebody else"
    assert reasons["2.attention"] == "it trains with dropout"
    assert reasons["3.attention"] == "no operation is known to fit this class"
    assert "4.attention" not in reasons
    assert mmkernels.patch(model.eval()).replaced == ["2.attention"]
    model.train()
    assert not torch.equal(model[2](*INPUT), INPUT[0] + 7)


def test_unwrapped():
    """accelerate leaves the class's own forward where its wrapper was."""
    model = model_of()
    attention = model[0].attention
    attention.forward = attention.forward
    attention.linear.forward = attention.linear.forward
    for each in (model, copy.deepcopy(model)):
        assert mmkernels.patch(each).replaced == ["0.attention"]
        assert torch.equal(each[0](*INPUT), INPUT[0] + 7)


def wrap(module, seen):
    """As accelerate adds a hook to a module: its forward is kept, and called by another."""
    module.kept = module.forward
    module.forward = lambda *arguments: seen.append(module) or module.kept(*arguments)


def test_wrapped_by_somebody_else():
    """The wrapper stays; what it has kept of ours computes as before once the model is unpatched."""
    model, seen = model_of(), []
    before = model[0](*INPUT)
    attention = model[0].attention
    mmkernels.patch(model)
    wrap(attention, seen)
    assert mmkernels.patch(model).left_alone == {"0.attention": "its forward was replaced by somebody else"}
    assert torch.equal(model[0](*INPUT), INPUT[0] + 7)
    assert mmkernels.unpatch(model) == ["0.attention"]
    assert torch.equal(model[0](*INPUT), before)
    assert len(seen) == 2
    attention.forward = attention.__dict__.pop("kept")
    assert torch.equal(model[0](*INPUT), before)
    assert mmkernels.patch(model).replaced == ["0.attention"]
    assert torch.equal(model[0](*INPUT), INPUT[0] + 7)
    mmkernels.unpatch(model)
    assert "forward" not in attention.__dict__


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ToyAttention()

    def head(self, image, text):
        return (image * text[:, None]).sum(1)

    def forward(self, image, text):
        return self.head(self.backbone(image, text), text)


def test_methods():
    """Of a module that does more than the method: its parts are patched, too. One that somebody else gave stays."""
    mmkernels.integrations.register(Model, lambda module: Replacement("spatial_attention", fused_head, "head"))
    model = Model()
    assert mmkernels.patch(model).replaced == ["", "backbone"]
    assert torch.equal(model(*INPUT), torch.full((), 3.0))
    assert mmkernels.unpatch(model) == ["", "backbone"]
    own = model.head = lambda image, text: text
    assert mmkernels.patch(model).left_alone == {"": "its head was replaced by somebody else"}
    mmkernels.unpatch(model)
    assert model.head is own


def fused_head(module, image, text):
    return torch.tensor(3.0)


def test_the_model_itself():
    model = ToyAttention()
    report = mmkernels.patch(model)
    assert report.replaced == [""]
    assert "(the model)" in str(report)


def test_shared_module_is_swapped_once():
    shared = ToyAttention()
    model = model_of(shared, shared)
    assert mmkernels.patch(model).replaced == ["0.attention"]
    assert torch.equal(model[1](*INPUT), INPUT[0] + 7)


def test_copies():
    """A copy's forward is the copy's own, and it can be undone by itself."""
    model = model_of()
    before = model[0](*INPUT)
    mmkernels.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other[0].attention.forward.args[0] is other[0].attention
        assert torch.equal(other[0](*INPUT), INPUT[0] + 7)
        assert mmkernels.unpatch(other) == ["0.attention"]
        assert torch.equal(other[0](*INPUT), before)
    assert torch.equal(model[0](*INPUT), INPUT[0] + 7)


@pytest.mark.parametrize("patch_first", [True, False])
def test_compiled(patch_first):
    """A graph that was made before is made anew."""
    model = model_of()[0]
    before = model(*INPUT)
    if patch_first:
        mmkernels.patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(*INPUT)
    if not patch_first:
        assert mmkernels.patch(compiled).replaced == ["_orig_mod.attention"]
    assert torch.equal(compiled(*INPUT), INPUT[0] + 7)
    mmkernels.unpatch(compiled)
    assert torch.allclose(compiled(*INPUT), before)


def test_traced_by_fx():
    """Its own operations, since symbols have no sizes to choose by."""
    model = model_of()[0]
    before = model(*INPUT)
    mmkernels.patch(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(*INPUT), before)


def test_moved():
    model = model_of()
    mmkernels.patch(model)
    model.to(torch.float64)
    assert model[0](INPUT[0].double(), INPUT[1].double()).dtype == torch.float64
    assert model[0].attention.linear.weight.dtype == torch.float64


def test_report_is_a_table():
    report = mmkernels.patch(model_of(ToyAttention(), ToySubclass()), dry_run=True)
    title, head, rule, first, second = str(report).splitlines()
    assert title == "1 of 2 modules that look like attention would be replaced"
    assert head.split() == ["module", "class", "now", "note"]
    assert first.split() == ["0.attention", "ToyAttention", "spatial_attention"]
    assert "a subclass of ToyAttention" in second
    assert str(mmkernels.patch(nn.Linear(2, 2))) == "0 of 0 modules that look like attention replaced"
    assert isinstance(report, PatchReport)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmkernels.patch("model"), "model must be a torch.nn.Module, got str"),
        (lambda: mmkernels.unpatch(None), "model must be a torch.nn.Module, got NoneType"),
        (lambda: mmkernels.patch(nn.Linear(1, 1), dry_run=1), "dry_run must be a bool, got int"),
        (lambda: mmkernels.integrations.register(int, convert), "cls must be a subclass of torch.nn.Module"),
        (lambda: mmkernels.integrations.register(nn.Linear, 3), "convert must be callable, got int"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_packages_by_name():
    """A package's module is imported when it is named; one that isn't there is no attribute."""
    code = "import mmkernels; print(mmkernels.integrations.transformers.register.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "mmkernels.integrations.transformers", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'pandas'"):
        _ = mmkernels.integrations.pandas
