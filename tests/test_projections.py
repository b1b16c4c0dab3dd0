"""The modules' projections are used as submodules: whatever is done to them takes effect, never silently not.

The truth is the modules' definition, written here, in float64, with the projections called as the modules hold them.
"""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from support.attention_tests import assert_rule, draw
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mmk
from mmkernels import reference
from mmkernels.reference.additive_attention import ACTIVATIONS

B, N, T, D, E = 3, 6, 4, 8, 5
MASK = torch.arange(B * N).view(B, N) % 4 > 0
OFFSETS = torch.tensor([0, 4, 4, B * N])

# The definitions. What the projections give in their own dtype goes on in `dtype`.


def spatial(module, image, vector, dtype):
    return reference.spatial_attention(image.to(dtype), module.text_projection(vector).to(dtype), num_heads=2)


def _heads(tensor, dtype):
    return tensor.to(dtype).unflatten(-1, (2, -1)).transpose(1, 2)


def _joined(tensor, image):
    return tensor.transpose(1, 2).flatten(2).to(image.dtype)


def gated(module, image, tokens, dtype):
    query, key, value, gate = (
        _heads(t, dtype)
        for t in (
            module.query_projection(image),
            module.key_projection(tokens),
            module.value_projection(tokens),
            module.gate_projection(image).relu(),
        )
    )
    return module.out_projection(_joined(reference.gated_cross_attention(query, key, value, gate), image))


def bidirectional(module, image, tokens, dtype):
    projected = (
        module.image_query_projection(image),
        module.text_key_projection(tokens),
        module.image_value_projection(image),
        module.text_value_projection(tokens),
    )
    image_out, text_out = reference.bidirectional_attention(*(_heads(t, dtype) for t in projected))
    return module.image_out_projection(_joined(image_out, image)), module.text_out_projection(_joined(text_out, image))


def pooling(module, image, query, dtype):
    projected = module.query_projection(query), module.key_projection(image), module.value_projection(image)
    result = reference.gated_cross_attention(*(_heads(t, dtype) for t in projected))
    return module.out_projection(_joined(result, image))


LEVELS, POINTS = ((2, 2), (1, 2)), (2, 1)
REFERENCE_POINTS = torch.rand(1, T, 2, 2, generator=torch.Generator().manual_seed(3)).expand(B, -1, -1, -1)


class Deformable(mmk.DeformableAttention):
    """Called as the others are."""

    def forward(self, image, tokens):
        return super().forward(tokens, image, REFERENCE_POINTS[: len(image)], LEVELS)


def deformable_layer():
    """Its offsets and scores depend on the queries, as they do after some training."""
    module = Deformable(D, 2, 2, POINTS)
    nn.init.normal_(module.offset_projection.weight)
    nn.init.normal_(module.score_projection.weight)
    return module


def deformable(module, image, tokens, dtype):
    heads = lambda t, *sizes: t.to(dtype).unflatten(-1, (2, *sizes))
    sizes = torch.tensor([(2, 2), (2, 2), (2, 1)])
    offsets = heads(module.offset_projection(tokens), 3, 2) / sizes
    locations = REFERENCE_POINTS.to(dtype)[:, :, None, [0, 0, 1]] + offsets
    value, scores = heads(module.value_projection(image), -1), heads(module.score_projection(tokens), 3)
    result = reference.deformable_attention(value, LEVELS, locations, scores, points=POINTS)
    return module.out_projection(result.to(image.dtype))


def channel(module, image, vector, dtype):
    both = torch.cat([image, vector[:, None].expand(-1, N, -1)], -1)
    return image.to(dtype) * module.score_projection(both).to(dtype).softmax(-1)


def _additive_scores(module, image, rows_of_vector, dtype):
    hidden = ACTIVATIONS[module.activation](module.image_projection(image) + rows_of_vector(module.query_projection))
    return module.score_projection(hidden * module.gate_projection(image).sigmoid()).to(dtype)


def additive(module, image, vector, dtype):
    image = image.where(MASK[..., None], 0)
    scores = _additive_scores(module, image, lambda project: project(vector)[:, None], dtype)
    weights = scores.masked_fill(~MASK[..., None], float("-inf")).softmax(1).mT
    return weights @ image.to(dtype), weights


def packed(module, image, vector, dtype):
    image = image.flatten(0, 1)
    sizes = OFFSETS.diff()
    scores = _additive_scores(module, image, lambda project: project(vector).repeat_interleave(sizes, 0), dtype)
    weights = torch.cat([s.softmax(0) for s in scores.split(sizes.tolist())])
    return weights * image.to(dtype), weights.mT


class Kind:
    """A module, how it is called, and its definition."""

    def __init__(self, operation, make, text, define, call=None):
        self.operation = operation
        self.make = make
        self.text = text
        self.define = define
        self.call = call or (lambda module, *tensors: module(*tensors))

    def module(self):
        torch.manual_seed(0)
        return self.make()

    def inputs(self):
        return draw(B, N, D), draw(B, *self.text, seed=1)


KINDS = {
    "spatial": Kind("spatial_attention", lambda: mmk.SpatialAttention(D, E, num_heads=2), (E,), spatial),
    "gated": Kind("gated_cross_attention", lambda: mmk.GatedCrossAttention(D, E, 2), (T, E), gated),
    "bidirectional": Kind(
        "bidirectional_attention", lambda: mmk.BidirectionalAttention(D, E, 12, 2), (T, E), bidirectional
    ),
    "gated, absorbed": Kind(
        "gated_cross_attention", lambda: mmk.GatedCrossAttention(D, E, 2, embed_dim=40), (T, E), gated
    ),
    "pooling, absorbed": Kind(
        "absorbed_attention", lambda: mmk.AttentionPooling(D, 2, query_dim=E, embed_dim=12), (T, E), pooling
    ),
    "deformable": Kind(
        "deformable_attention",
        deformable_layer,
        (T, D),
        deformable,
    ),
    "channel": Kind("channel_attention", lambda: mmk.ChannelAttention(D, E), (E,), channel),
    "additive": Kind(
        "additive_attention",
        lambda: mmk.AdditiveAttention(D, 7, E, num_queries=2, gated=True),
        (E,),
        additive,
        lambda module, *tensors: module(*tensors, mask=MASK, need_weights=True),
    ),
    "packed": Kind(
        "additive_attention",
        lambda: mmk.AdditiveAttention(D, 7, E, activation="gelu", gated=True, combine="multiply"),
        (E,),
        packed,
        lambda module, image, vector: module(image.flatten(0, 1), vector, offsets=OFFSETS, need_weights=True),
    ),
}
on_every_module = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
on_those_that_read = pytest.mark.parametrize(
    "kind", [KINDS[name] for name in ("channel", "additive", "packed")], ids=["channel", "additive", "packed"]
)


def projections(module):
    return {name: child for name, child in module.named_children() if name.endswith("_projection")}


def with_gradients(function, module, tensors):
    """Results, and the gradients of the inputs and of the parameters that have one."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    module.zero_grad()
    results = function(module, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    sum((r.double() * draw(*r.shape, dtype=torch.float64, seed=9 + i)).sum() for i, r in enumerate(results)).backward()
    parameters = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [*(r.detach() for r in results), *(t.grad for t in leaves), *parameters]


def only_results(function, module, tensors):
    results = function(module, *tensors)
    return results if isinstance(results, tuple) else (results,)


def assert_defined(kind, module, tensors):
    """The module computes its definition, forward and backward."""
    with torch.no_grad():
        kind.call(module, *tensors)  # weights that hooks compute have no graph then, and can be copied
    wide = copy.deepcopy(module).double()
    truth = with_gradients(functools.partial(kind.define, dtype=torch.float64), wide, [t.double() for t in tensors])
    peer = with_gradients(functools.partial(kind.define, dtype=torch.float32), module, tensors)
    assert_rule(with_gradients(kind.call, module, tensors), truth, peer)


def assert_results_defined(kind, module, tensors):
    """The results alone, of projections that can't be copied to float64: truth and peer have them as they are."""
    truth, peer = (
        only_results(functools.partial(kind.define, dtype=dtype), module, tensors)
        for dtype in (torch.float64, torch.float32)
    )
    assert_rule(only_results(kind.call, module, tensors), [t.double() for t in truth], peer)


def kernels_of(function, *arguments):
    """Which of our operations ran."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            if called.namespace == "mmkernels":
                found.append(called.name())
            return called(*args, **(kwargs or {}))

    found = []
    with Record():
        function(*arguments)
    return found


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
# projections
# see what attention gives, which isn't, and are left out.


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
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opacus(extension, kind):
    """Each sample's gradients are those of the sample alone. (Packed bags have no batch dimension, which opacus
    needs.)"""
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

    sampled = opacus.GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
    loss(sampled(image, text)).backward()
    assert_rule(
        [p.grad_sample for p in sampled.parameters()], one_by_one(torch.float64), one_by_one(torch.float32), batch=B
    )


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
