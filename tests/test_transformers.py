"""transformers' modules, patched: the same results and gradients, and back, bit for bit."""

import copy
import io

import pytest
import torch
from support.attention_tests import assert_rule
from support.patched import Called, assert_equal, assert_patched, assert_same_in_onnx, upstream_of, with_gradients
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mmkernels

pytest.importorskip("transformers")

from support import transformers_modules as tiny

from mmkernels.integrations.transformers import reasons

DTYPES = [torch.float32, torch.bfloat16]
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DEFORMABLE = [(folder, n) for folder in (*tiny.DETR, *tiny.PADDING_MASK) for n in (2, 4)]
DEFORMABLE += [(folder, 4) for folder in tiny.UNEVEN]


@in_both_dtypes
@pytest.mark.parametrize("folder, coordinates", DEFORMABLE)
def test_deformable(folder, coordinates, dtype):
    tensors = tiny.deformable_tensors(folder, coordinates, dtype)
    call = lambda module, *tensors: tiny.call_deformable(folder, module, *tensors)[0]
    assert_patched(call, tiny.deformable(folder), tensors, "deformable_attention")


@in_both_dtypes
@pytest.mark.parametrize("folder", tiny.FUSION)
def test_fusion(folder, dtype):
    assert_patched(tiny.call_fusion, tiny.fusion(folder), tiny.fusion_tensors(dtype), "bidirectional_attention", "attn")


def test_weights_of_a_part_of_a_model():
    """What tells that they are wanted isn't patched with the part, which is left alone."""
    encoder = tiny.fusion("grounding_dino")
    image, text = tiny.fusion_tensors()
    before = encoder(image, text, output_attentions=True)
    assert "patch that one, or the whole model" in mmkernels.patch(encoder.attn).left_alone[""]
    assert_all_equal(encoder(image, text, output_attentions=True), before)
    assert mmkernels.patch(encoder).replaced == ["attn"]
    assert mmkernels.patch(encoder.attn).replaced == [""]
    assert_all_equal(encoder(image, text, output_attentions=True), before)
    assert [weights for _, weights in encoder(image, text)] == [None, None]
    mmkernels.unpatch(encoder)
    own = encoder.forward = lambda *given, **named: None
    assert mmkernels.patch(encoder).replaced == []
    assert encoder.forward is own


def assert_all_equal(found, expected):
    for pair in zip(found, expected, strict=True):
        assert_equal(*pair)


@pytest.mark.parametrize("folder", ["deformable_detr", "mask2former", "d_fine"])
def test_weights_where_asked_for(folder):
    """Beside the operation, in the shape that the model gives them; else not computed."""
    tensors = tiny.deformable_tensors(folder, 4)
    call = lambda module, *tensors: tiny.call_deformable(folder, module, *tensors, output_attentions=True)
    module = tiny.deformable(folder)
    assert_patched(call, module, tensors, "deformable_attention")
    mmkernels.patch(module)
    assert tiny.call_deformable(folder, module, *tensors)[1] is None


def test_other_samplings_go_the_plain_way():
    """RT-DETRv2's by points instead of boxes, which fits no shape, and by its discrete method."""
    module = tiny.deformable("rt_detr_v2")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must match the size"):
            tiny.call_deformable("rt_detr_v2", module, *tiny.deformable_tensors("rt_detr_v2", 2))
        mmkernels.patch(module)
    mmkernels.unpatch(module)
    module.method = "discrete"
    assert mmkernels.patch(module).left_alone == {"": "it samples by the method 'discrete', not bilinearly"}


def test_what_samples_may_be_replaced():
    """transformers has it as a module of its own, for kernels from elsewhere."""
    module = tiny.deformable("deformable_detr")
    seen = []
    mmkernels.patch(module)
    module.attn.register_forward_hook(lambda *call: seen.append(call))
    tiny.call_deformable("deformable_detr", module, *tiny.deformable_tensors("deformable_detr", 4))
    assert len(seen) == 1
    mmkernels.unpatch(module)
    module.attn.forward = tiny.deformable("deformable_detr").attn.forward
    assert "replaced by somebody else" in mmkernels.patch(module).left_alone[""]


@in_both_dtypes
@pytest.mark.parametrize("folder", ["deformable_detr", "mask2former", "d_fine", "rt_detr_v2"])
def test_deformable_under_autocast(folder, dtype):
    """As exact as before, and of the same dtype; D-FINE's samples what no projection has rounded."""
    module, tensors = tiny.deformable(folder), tiny.deformable_tensors(folder, 4, dtype)
    call = lambda module, tensors: tiny.call_deformable(folder, module, *tensors)[0].detach()
    truth = call(copy.deepcopy(module).double(), [t.double() for t in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(module, tensors)
        mmkernels.patch(module)
        found = call(module, tensors)
    assert found.dtype == plain.dtype
    assert_rule(found, truth, plain)


def test_training_with_dropout():
    """No operation drops weights: as before, random numbers included; in eval they are fused."""
    module = tiny.fusion("grounding_dino", fusion_dropout=0.5)
    mmkernels.patch(module)
    image, text = tiny.fusion_tensors()
    fused = tiny.call_fusion(module, image, text)
    module.train()
    assert_plain(tiny.call_fusion, module, (image, text))
    mmkernels.unpatch(module)
    assert "trains with dropout 0.5" in mmkernels.patch(module).left_alone["attn"]
    mmkernels.patch(module.eval())
    assert_equal(tiny.call_fusion(module, image, text), fused)


def assert_plain(call, module, tensors):
    """A patched module computes what it computes unpatched, bit for bit."""
    plain = copy.deepcopy(module)
    assert mmkernels.unpatch(plain)
    torch.manual_seed(3)
    found = with_gradients(call, module, tensors)
    torch.manual_seed(3)
    assert_equal(found, with_gradients(call, plain, tensors))


class LowRank(nn.Module):
    """What LoRA makes of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, features):
        return self.base(features) + self.up(self.down(features))


def test_wrapped_and_hooked_projections_are_called():
    module = tiny.fusion("grounding_dino")
    module.attn.vision_proj = LowRank(module.attn.vision_proj)
    tiny.randomised(module)
    assert_patched(tiny.call_fusion, module, tiny.fusion_tensors(), "bidirectional_attention", "attn")
    module = tiny.fusion("grounding_dino")
    mmkernels.patch(module)
    seen = []
    module.attn.out_vision_proj.register_forward_hook(lambda *call: seen.append(call))
    tiny.call_fusion(module, *tiny.fusion_tensors())
    assert len(seen) == 1


LAYERS = {
    "deformable": (
        lambda: tiny.deformable("deformable_detr"),
        lambda module, *tensors: tiny.call_deformable("deformable_detr", module, *tensors)[0],
        tiny.deformable_tensors("deformable_detr", 4),
    ),
    "boxes": (
        lambda: tiny.deformable("d_fine"),
        lambda module, *tensors: tiny.call_deformable("d_fine", module, *tensors)[0],
        tiny.deformable_tensors("d_fine", 4),
    ),
    "fusion": (lambda: tiny.fusion("grounding_dino"), tiny.call_fusion, tiny.fusion_tensors()),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


@each_layer
def test_autocast(layer):
    """Dtypes as before."""
    make, call, tensors = LAYERS[layer]
    module = make()

    def run(module, *tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(module, *tensors)

    truth = with_gradients(call, copy.deepcopy(module).double(), [t.double() for t in tensors])
    plain = with_gradients(run, module, tensors)
    mmkernels.patch(module)
    assert_rule(with_gradients(run, module, tensors), truth, plain)


@each_layer
def test_copies(layer):
    make, call, tensors = LAYERS[layer]
    module = make()
    before = call(module, *tensors)
    mmkernels.patch(module)
    fused = call(module, *tensors)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert_equal(call(other, *tensors), fused)
        mmkernels.unpatch(other)
        assert_equal(call(other, *tensors), before)
    assert_equal(call(module, *tensors), fused)


@pytest.mark.parametrize("layer, patch_first", [("deformable", True), ("boxes", True), ("fusion", False)])
def test_compiled(layer, patch_first):
    """In one graph; one that was made before is made anew."""
    make, call, tensors = LAYERS[layer]
    module = make()
    truth = call(copy.deepcopy(module).double(), *(t.double() for t in tensors))
    before = call(module, *tensors)
    if patch_first:
        mmkernels.patch(module)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    found = call(compiled, *tensors)
    if not patch_first:
        mmkernels.patch(compiled)
        found = call(compiled, *tensors)
    assert_rule(found, truth, before)
    calls = [str(node.target) for node in graphs.graphs[-1].graph.nodes]
    assert any("mmkernels" in name for name in calls)


@pytest.mark.filterwarnings("ignore")
@each_layer
def test_exported_without_our_operations(layer, monkeypatch):
    """ONNX knows none of them, and a traced graph has to load where this package isn't."""
    make, call, tensors = LAYERS[layer]
    module = make()
    mmkernels.patch(module)
    wrapped = Called(call, module)
    traced = torch.jit.trace(wrapped, tuple(tensors), check_trace=False)
    assert "mmkernels" not in str(traced.inlined_graph)
    assert "mmkernels" in str(torch.export.export(wrapped, tuple(tensors)))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "mmkernels" not in str(torch.export.export(wrapped, tuple(tensors)))


@each_layer
def test_onnx(layer):
    make, call, tensors = LAYERS[layer]
    assert_same_in_onnx(call, make(), tensors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_an_exported_program():
    """Exported first, it holds operations that ONNX doesn't have, which is an error; from the model it is plain."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    make, call, tensors = LAYERS["deformable"]
    module = make()
    mmkernels.patch(module)
    called = Called(call, module)
    program = torch.export.export(called, tuple(tensors))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="No ONNX function found for.*mmkernels"):
        torch.onnx.export(program, dynamo=True, verbose=False)
    assert "mmkernels" not in str(torch.onnx.export(called, tuple(tensors), dynamo=True, verbose=False).model)


@pytest.fixture
def one_process():
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@each_layer
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
def test_distributed(layer, patch_first, wrap, one_process):
    """Wrapped before or after; the wrapper gets its gradients, of every parameter."""
    make, call, tensors = LAYERS[layer]
    module = make()
    mmkernels.patch(module)
    fused = with_gradients(call, module, tensors)
    if not patch_first:
        mmkernels.unpatch(module)
    options = {"mesh": init_device_mesh("cpu", (1,))} if wrap is fully_shard else {}
    wrapped = wrap(module, **options)
    if not patch_first:
        assert len(mmkernels.patch(wrapped)) == 1
    tensors = [t.clone().requires_grad_() for t in tensors]
    results = call(wrapped, *tensors)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, upstream_of(results))
    grads = [p.grad.full_tensor() if wrap is fully_shard else p.grad for p in wrapped.parameters()]
    found = [*results, *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors), *grads]
    assert_equal(found, fused)


REASONS = {
    ("bert", "BertSelfAttention"): reasons.CHOSEN,
    ("vit", "ViTAttention"): reasons.CHOSEN,
    ("swinv2", "Swinv2SelfAttention"): reasons.BIAS,
    ("sam", "SamVisionAttention"): reasons.BIAS,
    ("deberta_v2", "DisentangledSelfAttention"): reasons.BIAS,
    ("longformer", "LongformerSelfAttention"): reasons.PAIRS,
    ("mobilevitv2", "MobileViTV2LinearSelfAttention"): reasons.PAIRS,
    ("vilt", "ViltSelfAttention"): reasons.WRITTEN_OUT,
    ("lxmert", "LxmertAttention"): reasons.WRITTEN_OUT,
}


@pytest.mark.parametrize("folder, name", REASONS)
def test_why_not(folder, name):
    """The report tells what a class's code shows."""
    cls = getattr(tiny.source(folder), name)
    bare = cls.__new__(cls)
    nn.Module.__init__(bare)
    assert mmkernels.patch(bare).left_alone == {"": REASONS[folder, name]}
