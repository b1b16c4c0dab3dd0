"""Modules with their projections of the image absorbed compute what they compute with them, or say why they can't."""

import copy
import functools
import pickle

import pytest
import torch
from support.attention_tests import assert_rule, draw
from support.projections import kernels_of, projections
from torch import nn

import mmkernels as mmk
from mmkernels.tolerance import half_an_epsilon_off

B, N, T, D, E = 3, 21, 5, 16, 6
IMAGE_MASK = torch.arange(B * N).view(B, N) % 4 > 0
TEXT_MASK = torch.arange(B * T).view(B, T) % 3 > 0
IMAGE_MASK[1], TEXT_MASK[2] = False, False  # a sample of which nothing takes part

# name: how it is made, whether text is given, masks, what is absorbed
KINDS = {
    "bidirectional": (
        functools.partial(mmk.BidirectionalAttention, D, E, 24, 3),
        True,
        {"image_mask": IMAGE_MASK, "text_mask": TEXT_MASK},
        ("image_query_projection", "image_value_projection", "image_out_projection"),
    ),
    "gated": (
        functools.partial(mmk.GatedCrossAttention, D, E, embed_dim=24, value_dim=10),
        True,
        {"mask": TEXT_MASK},
        ("query_projection",),
    ),
    "gated of heads, normed": (
        functools.partial(mmk.GatedCrossAttention, D, E, 2, embed_dim=24, value_dim=10, norm=nn.LayerNorm(10)),
        True,
        {"mask": TEXT_MASK},
        ("query_projection",),
    ),
    "pooling": (
        functools.partial(mmk.AttentionPooling, D, 2, 3, embed_dim=24, out_dim=7),
        False,
        {"image_mask": IMAGE_MASK},
        ("key_projection", "value_projection"),
    ),
    "pooling of queries": (
        functools.partial(mmk.AttentionPooling, D, 3, query_dim=E, embed_dim=24),
        True,
        {"image_mask": IMAGE_MASK},
        ("key_projection", "value_projection"),
    ),
}
on_every_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of their gradients what flows through the softmax over tokens cancels: of 16 bits few digits are left.
CANCEL = "text_key_projection.bias", "key_projection.bias"


def made(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return copy.deepcopy(KINDS[kind][0](**options)).to(dtype)


def inputs(kind, dtype=torch.float32):
    return [draw(B, N, D).to(dtype), draw(B, T, E, seed=1).to(dtype)][: 1 + KINDS[kind][1]]


def results_of(module, tensors, **options):
    results = module(*tensors, **options)
    return results if isinstance(results, tuple) else (results,)


def computed(module, tensors, **options):
    """By name: results, and gradients of the inputs and of every parameter."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    module.zero_grad()
    results = results_of(module, leaves, **options)
    upstream = [draw(*r.shape, seed=9 + i).bfloat16().to(r.dtype) for i, r in enumerate(results)]
    torch.autograd.backward(results, upstream)
    found = {f"result {i}": r.detach() for i, r in enumerate(results)}
    found |= {f"gradient {i}": t.grad for i, t in enumerate(leaves)}
    return found | {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(module, tensors, leave=(), **options):
    """Absorbed, by the rule: the truth is the module with its projections in float64, the measure plain PyTorch in the
    module's dtype."""
    absorbed, plain = (copy.deepcopy(module) for _ in range(2))
    absorbed.absorb = True
    plain.absorb, plain.backend = False, "reference"
    found = computed(absorbed, tensors, **options)
    peer = computed(plain, tensors, **options)
    narrow = None
    if tensors[0].dtype == torch.float64:
        narrow = computed(copy.deepcopy(plain).float(), [t.float() for t in tensors], **options)
    truth = computed(plain.double(), [t.double() for t in tensors], **options)
    for parameter, given in zip(plain.parameters(), module.parameters()):
        parameter.data = half_an_epsilon_off(given.data)
    rounded = computed(plain, [half_an_epsilon_off(t) for t in tensors], **options)
    names = [name for name in truth if not name.startswith(tuple(leave) or "-")]
    pick = lambda values: None if values is None else [values[name] for name in names]
    assert_rule(pick(found), pick(truth), pick(peer), pick(narrow), B, pick(rounded))


@on_every_kind
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_in_float64(extension, kind, masked, bias):
    options = KINDS[kind][2] if masked else {}
    assert_same(made(kind, torch.float64, bias=bias), inputs(kind, torch.float64), **options)


@on_every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_in_other_dtypes(extension, kind, dtype):
    leave = CANCEL if dtype != torch.float32 else ()
    assert_same(made(kind, dtype), inputs(kind, dtype), leave, **KINDS[kind][2])


def large_biases(module):
    for child in projections(module).values():
        child.bias.data.mul_(10)


def ill_conditioned(module):
    for child in projections(module).values():
        u, s, v = torch.linalg.svd(child.weight.data, full_matrices=False)
        child.weight.data = u * s * torch.logspace(0, -4, len(s)) @ v


@on_every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [large_biases, ill_conditioned])
def test_hard_projections(extension, kind, dtype, change):
    """Beside features that have much in common, which projections take away. The draw isn't that of the others: there
    the key projection's bias has a gradient in float32 that cancels to nothing, too."""
    module = made(kind)
    change(module)
    tensors = inputs(kind)
    tensors[0] = draw(B, N, D, seed=100) + 3 * draw(D, seed=5)
    leave = CANCEL if dtype != torch.float32 else ()
    assert_same(module.to(dtype), [t.to(dtype) for t in tensors], leave, **KINDS[kind][2])


@pytest.mark.parametrize("kind, seed", [("pooling", 6), ("pooling", 7), ("pooling", 9), ("pooling of queries", 3)])
def test_a_rest_of_the_sum_of_gradients(extension, kind, seed):
    """A softmax's gradients add up to 0, rounded to a rest: times what all positions have in common it was three times
    what plain PyTorch's is, whose sums cancel by themselves. Draws that showed it."""
    module = made(kind)
    ill_conditioned(module)
    tensors = inputs(kind)
    tensors[0] = draw(B, N, D, seed=seed) + 3 * draw(D, seed=5)
    assert_same(module, tensors)
    assert_same(module, tensors, **KINDS[kind][2])


@pytest.mark.property("the module's projections", operation=["absorbed_attention"])
@on_every_kind
def test_chosen(extension, kind):
    """As asked for; a projection with a hook is called, unless that was forbidden."""
    tensors = inputs(kind)
    for absorb in (True, False):
        module = made(kind, absorb=absorb)
        absorbed = kernels_of(lambda: module(*tensors)) == ["mmkernels::absorbed_attention"]
        assert absorbed == absorb
    for name in KINDS[kind][3]:
        module = made(kind, absorb=True)
        calls = []
        getattr(module, name).register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=f"absorb must be None or False where {name} isn't a plain nn.Linear"):
            module(*tensors)
        module.absorb = None
        module(*tensors)
        assert calls


@on_every_kind
def test_set_to_something_else(extension, kind):
    module = made(kind)
    for wrong in ("x", 1):
        module.absorb = wrong
        with pytest.raises(
            TypeError, match=f"absorb must be None, True or False, got {type(wrong).__name__} {wrong!r}"
        ):
            module(*inputs(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("gated")])
def test_what_absorbing_excludes(extension, kind):
    """Weights, and masks but of tokens: an error where absorbing is demanded, else they go the plain way."""
    module, tensors = made(kind), inputs(kind)
    for options, message in (
        ({"need_weights": True}, "need_weights must be False with absorb=True, got True"),
        (
            {"mask": torch.zeros(B, T)},
            r"mask must be None or bool \[B, T\] = \[3, 5\] with absorb=True, got torch.float32 \[3, 5\]",
        ),
        ({"mask": TEXT_MASK[:, None, None]}, r"mask .* with absorb=True, got torch.bool \[3, 1, 1, 5\]"),
        ({"mask": TEXT_MASK[0]}, r"mask .* with absorb=True, got torch.bool \[5\]"),
    ):
        module.absorb = None
        assert kernels_of(lambda: module(*tensors, **options)) == ["mmkernels::gated_cross_attention"]
        module.absorb = True
        with pytest.raises(ValueError, match=message):
            module(*tensors, **options)


def test_absorb_pays():
    assert mmk.absorb_pays(17_821, 16, 256, 1024, 4) and mmk.absorb_pays(729, 1, 1152, 1152, 16, attend=False)
    assert not mmk.absorb_pays(4096, 77, 320, 320, 8)
    with pytest.raises(ValueError, match="attend must be True with pool=False, got False: no result is wanted"):
        mmk.absorb_pays(4, 4, 4, 4, 1, pool=False, attend=False)


@pytest.mark.property("copies of the module", operation=["absorbed_attention"])
@on_every_kind
def test_compiled_mapped_and_copied(extension, kind):
    """One graph, with gradients; torch.func; a module with the other's state, and a copy."""
    module, tensors = made(kind, absorb=True), inputs(kind)
    expected = computed(module, tensors)
    torch._dynamo.reset()
    compiled = computed(torch.compile(module, backend="aot_eager", fullgraph=True), tensors)
    assert_rule(list(compiled.values()), [t.double() for t in expected.values()], list(expected.values()))
    other = made(kind, absorb=True)
    other.load_state_dict(made(kind, absorb=False).state_dict())
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(a, b) for a, b in zip(computed(same, tensors).values(), expected.values()))
    mapped = torch.func.vmap(module)(*(torch.stack([t, t]) for t in tensors))
    mapped = mapped if isinstance(mapped, tuple) else (mapped,)
    results = [torch.stack([r, r]) for r in results_of(module, tensors)]
    assert_rule(mapped, [r.double() for r in results], results)


@on_every_kind
def test_autocast(extension, kind):
    module, tensors = made(kind), inputs(kind)
    found = {}
    for absorb in (True, False):
        module.absorb = absorb
        with torch.autocast("cpu", torch.bfloat16):
            found[absorb] = results_of(module, tensors, **KINDS[kind][2])
    wide = copy.deepcopy(module).double()
    truth = results_of(wide, [t.double() for t in tensors], **KINDS[kind][2])
    assert_rule(found[True], truth, found[False])
