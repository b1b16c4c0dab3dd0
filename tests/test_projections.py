"""The modules' projections are used as submodules: whatever is done to them takes effect, never silently not.

The truth is their definition (support/projections.py) in float64, with the projections called as the modules hold
them.
"""

import copy
import pickle
import warnings

import pytest
import torch
from support.attention_tests import assert_rule, draw
from support.projections import (
    KINDS,
    MASK,
    OFFSETS,
    B,
    D,
    N,
    assert_defined,
    assert_results_defined,
    kernels_of,
    only_results,
    projections,
    with_gradients,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

import mmkernels as mmk

on_every_module = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
on_those_that_read = pytest.mark.parametrize(
    "kind", [KINDS[name] for name in ("channel", "additive", "packed")], ids=["channel", "additive", "packed"]
)


@pytest.mark.property("the module")
@on_every_module
def test_plain_projections_are_fused(extension, kind):
    """Also where torch.func puts plain tensors in their place."""
    module, tensors = kind.module(), kind.inputs()
    assert_defined(kind, module, tensors)
    assert len(kernels_of(kind.call, module, *tensors)) == 1
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    call = lambda *given: torch.func.functional_call(
        module, parameters, given, {"offsets": OFFSETS} if kind is KINDS["packed"] else {}
    )
    image, text = tensors
    assert len(kernels_of(call, image.flatten(0, 1) if kind is KINDS["packed"] else image, text)) == 1


# Hooks ----------------------------------------------------------------------------------------------------------------


def _count(count):
    count.append(1)


HOOKS = {
    "forward": lambda child, count: child.register_forward_hook(
        lambda module, given, result: _count(count) or 2 * result
    ),
    "forward pre": lambda child, count: child.register_forward_pre_hook(
        lambda module, given: _count(count) or (2 * given[0],)
    ),
    "forward with keywords": lambda child, count: child.register_forward_hook(
        lambda module, given, named, result: _count(count) or 2 * result, with_kwargs=True
    ),
    "backward": lambda child, count: child.register_full_backward_hook(
        lambda module, grads, upstream: _count(count) or tuple(None if g is None else 2 * g for g in grads)
    ),
    "backward pre": lambda child, count: child.register_full_backward_pre_hook(
        lambda module, upstream: _count(count) or (2 * upstream[0],)
    ),
}


@pytest.mark.property("the module's projections")
@on_every_module
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks(extension, kind, hook):
    module, tensors = kind.module(), kind.inputs()
    counts = {name: [] for name in projections(module)}
    hooks = [hook(child, counts[name]) for name, child in projections(module).items()]
    with_gradients(kind.call, module, tensors)
    assert all(len(count) == 1 for count in counts.values()), counts
    assert_defined(kind, module, tensors)
    for hook in hooks:
        hook.remove()
    assert len(kernels_of(kind.call, module, *tensors)) == 1


@on_every_module
def test_global_hooks(extension, kind):
    module = kind.module()
    tensors = kind.inputs()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda child, given, result: seen.append(child))
    try:
        kind.call(module, *tensors)
    finally:
        hook.remove()
    assert all(any(child is s for s in seen) for child in projections(module).values())


@on_every_module
def test_one_hook_is_enough(extension, kind):
    tensors = kind.inputs()
    for name in projections(kind.module()):
        module, count = kind.module(), []
        HOOKS["forward"](getattr(module, name), count)
        assert_defined(kind, module, tensors)
        assert count


# Other projections ----------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """As libraries write it: the frozen layer, and a product of two small matrices beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(child):
    other = Doubled(child.in_features, child.out_features, child.bias is not None)
    other.load_state_dict(child.state_dict())
    return other


def patched(child):
    """As accelerate does it."""
    forward = child.forward
    child.forward = lambda x: 2 * forward(x)
    return child


def weightless(child):
    """Whose weight comes from elsewhere."""
    weight = child.weight.detach().clone().requires_grad_()
    del child.weight
    child.weight = 2 * weight
    return child


REPLACED = {
    "LoRA": LoRA,
    "subclass": doubled,
    "sequence": lambda child: nn.Sequential(child, nn.Tanh()),
    "patched": patched,
    "weightless": weightless,
}


@pytest.mark.property("the module's projections")
@on_every_module
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_replaced(extension, kind, replace):
    module, tensors = kind.module(), kind.inputs()
    before = only_results(kind.call, module, tensors)
    for name, child in projections(module).items():
        torch.manual_seed(1)
        setattr(module, name, replace(child))
    assert not torch.equal(before[0], only_results(kind.call, module, tensors)[0])
    (assert_results_defined if replace in (patched, weightless) else assert_defined)(kind, module, tensors)
    kind.call(module, *tensors)[0].sum().backward()
    if replace is LoRA:
        trained = [p for p in module.parameters() if p.requires_grad]
        assert len(trained) == 2 * len(projections(module)) and all(
            p.grad is not None and p.grad.any() for p in trained
        )


def pruned(child):
    prune.random_unstructured(child, "weight", amount=0.5)


def old_weight_norm(child):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is old, and used
        nn.utils.weight_norm(child)


CHANGED = {
    "prune": pruned,
    "hook-based weight_norm": old_weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.property("the module's projections")
@on_every_module
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_changed_weights(extension, kind, change):
    """Step by step: a weight that was computed once would be stale, or have lost its graph."""
    module, tensors = kind.module(), kind.inputs()
    torch.manual_seed(1)
    for child in projections(module).values():
        change(child)
    module.eval()  # spectral_norm's vectors move in training
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for _ in range(3):
        assert_defined(kind, module, tensors)
        optimizer.zero_grad()
        sum(r.square().sum() for r in only_results(kind.call, module, tensors)).backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
    if change is pruned:
        for child in projections(module).values():
            prune.remove(child, "weight")
        assert_defined(kind, module, tensors)
        assert len(kernels_of(kind.call, module, *tensors)) == 1


# Quantisation: inference only. What is rounded to integers must be the same bits in the definition: the last
# projections see what attention gives, which isn't, and are left out.


def without_last(kind):
    module = kind.module()
    for name in projections(module):
        if "out_projection" in name:
            setattr(module, name, nn.Identity())
    return module.requires_grad_(False)


def assert_quantized(kind, module, quantized):
    tensors = kind.inputs()
    assert_results_defined(kind, quantized, tensors)
    assert not torch.equal(only_results(kind.call, module, tensors)[0], only_results(kind.call, quantized, tensors)[0])


@pytest.mark.property("the module's projections")
@on_every_module
@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no quantised engine here"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantize_dynamic(extension, kind):
    module = without_last(kind)
    assert_quantized(kind, module, torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8))


@on_every_module
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torchao(extension, kind, name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    module = without_last(kind)
    quantized = copy.deepcopy(module)
    quantization.quantize_(quantized, getattr(quantization, name)())
    assert all(
        type(child.weight) is not nn.Parameter
        for child in projections(quantized).values()
        if isinstance(child, nn.Linear)
    )
    assert_quantized(kind, module, quantized)


# Per-sample gradients -------------------------------------------------------------------------------------------------


@pytest.mark.property("the module's projections")
@pytest.mark.parametrize(
    "kind", [kind for name, kind in KINDS.items() if name != "packed"], ids=[name for name in KINDS if name != "packed"]
)
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "vmap"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opacus(extension, kind, mode):
    """Each sample's gradients are those of the sample alone: by each of opacus' ways (hooks, functorch, expanded
    weights), and by torch.func. (Packed bags have no batch dimension, which they need.)"""
    opacus = pytest.importorskip("opacus", reason="opacus is not installed")
    module = kind.module()
    image, text = kind.inputs()

    def loss(results):
        results = results if isinstance(results, tuple) else (results,)
        return sum(r.square().sum() for r in results)

    def one_by_one(dtype):
        plain = copy.deepcopy(module).to(dtype)
        plain.backend = "reference"
        found = []
        for i in range(B):
            plain.zero_grad()
            loss(plain(image[i : i + 1].to(dtype), text[i : i + 1].to(dtype))).backward()
            found.append([p.grad.clone() for p in plain.parameters()])
        return [torch.stack(grads) for grads in zip(*found)]

    def by_opacus():
        if mode == "ew":
            sampled = opacus.grad_sample.GradSampleModuleExpandedWeights(copy.deepcopy(module), loss_reduction="sum")
        else:
            by_functorch = mode == "functorch"
            copied = copy.deepcopy(module)
            sampled = opacus.GradSampleModule(copied, loss_reduction="sum", force_functorch=by_functorch)
        loss(sampled(image, text)).backward()
        return [p.grad_sample for p in sampled.parameters()]

    def by_vmap():
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        of_one = lambda *sample: loss(torch.func.functional_call(module, sample[0], tuple(t[None] for t in sample[1:])))
        return list(torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(parameters, image, text).values())

    found = by_vmap() if mode == "vmap" else by_opacus()
    assert_rule(found, one_by_one(torch.float64), one_by_one(torch.float32), batch=B)


# Never a silent fallback, and torch.compile ---------------------------------------------------------------------------


@on_those_that_read
def test_forced_backend_calls_nothing(extension, kind):
    """A kernel that was asked for by name can't call them."""
    module, tensors = kind.module(), kind.inputs()
    for backend in ("cpu", "reference", None):
        module.backend = backend
        kind.call(module, *tensors)
    HOOKS["forward"](module.score_projection, [])
    for backend in ("reference", None):
        module.backend = backend
        assert_defined(kind, module, tensors)
    module.backend = "cpu"
    with pytest.raises(mmk.BackendError, match="'cpu'.* where score_projection isn't a plain nn.Linear"):
        kind.call(module, *tensors)


@on_those_that_read
def test_masked_positions_and_autocast_as_fused(extension, kind):
    """What a masked position holds reaches nothing, dtypes are those of the fused way."""
    module = kind.module()
    image, text = kind.inputs()
    hooked = copy.deepcopy(module)
    HOOKS["forward"](hooked.score_projection, [])
    if kind is KINDS["additive"]:
        clean, dirty = (
            with_gradients(kind.call, hooked, (image.masked_fill(~MASK[..., None], value), text))
            for value in (0, float("nan"))
        )
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    with torch.autocast("cpu", torch.bfloat16):
        fused, called = (only_results(kind.call, m, (image, text)) for m in (module, hooked))
    assert [t.dtype for t in fused] == [t.dtype for t in called]


@on_every_module
@pytest.mark.parametrize("hooked", [False, True])
def test_compile_and_export(extension, kind, hooked):
    """One graph, with the operation in it where nothing needs a call."""
    module = kind.module()
    tensors = kind.inputs()
    graphs = []
    if hooked:
        for child in projections(module).values():
            child.register_forward_hook(lambda module, given, result: 2 * result)

    def backend(graph, example):
        graphs.append(graph)
        return graph

    fused = not (hooked and kind in (KINDS["channel"], KINDS["additive"], KINDS["packed"]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: kind.call(module, *t), fullgraph=True, backend=backend)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(compiled, kind.call(module, *tensors)))
    image, text = tensors
    arguments, options = (
        ((image.flatten(0, 1), text), {"offsets": OFFSETS}) if kind is KINDS["packed"] else ((image, text), {})
    )
    graphs.append(torch.export.export(module, arguments, options, strict=False).graph_module)
    for graph in graphs:
        assert sum("mmkernels" in str(node.target) for node in graph.graph.nodes if node.op == "call_function") == fused


def by_state_dict(module):
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        torch.nn.init.normal_(parameter)
    copied.load_state_dict(module.state_dict())
    return copied


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "state_dict": by_state_dict}


@pytest.mark.property("copies of the module")
@on_every_module
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(extension, kind, copied):
    """The same bits, gradients included; its parameters are its own."""
    module = kind.module()
    other = copied(module)
    found, expected = (with_gradients(kind.call, m, kind.inputs()) for m in (other, module))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    theirs = {p.data_ptr() for p in module.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in other.parameters())


@on_every_module
def test_empty(extension, kind):
    """Projections that are called give what the kernels give where there is nothing."""
    for image in (draw(0, N, D), draw(B, 0, D)):
        if kind is KINDS["deformable"] and not image.shape[1]:
            continue  # its levels have a position at least
        module = kind.module()
        text = draw(len(image), *kind.text)
        hooked = copy.deepcopy(module)
        for child in projections(hooked).values():
            child.register_forward_hook(lambda module, given, result: None)
        options = {"offsets": [0] * (len(image) + 1)} if kind is KINDS["packed"] else {}
        image = image.flatten(0, 1) if options else image
        for a, b in zip(*(only_results(lambda m, *t: m(*t, **options), m, (image, text)) for m in (module, hooked))):
            assert torch.equal(a, b)
