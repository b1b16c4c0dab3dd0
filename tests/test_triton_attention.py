"""Gated cross-attention and bidirectional attention in Triton, interpreted: what the cases of all backends don't
reach."""

import functools
import importlib
import inspect

import pytest
import torch
from support.attention_tests import assert_computes, assert_meets, assert_rule, standard_of
from support.triton_tests import Guards, draw, interpreted, on_every_dtype

import mmkernels as mmk
from mmkernels import backends

OPERATIONS = ("gated_cross_attention", "bidirectional_attention")
on_both = pytest.mark.parametrize("operation", OPERATIONS)


def inputs(operation, shape, dtype=torch.float32):
    """query, key, value, gate; or image_query, text_key, image_value, text_value."""
    B, H, N, T, d, dv = shape
    last = ((N, dv), (T, dv)) if operation == "bidirectional_attention" else ((T, dv), (N, dv))
    return [draw(B, H, rows, width, dtype=dtype, seed=i) for i, (rows, width) in enumerate(((N, d), (T, d), *last))]


def masks(operation, shape, share=0.3):
    B, H, N, T, *_ = shape
    some = {
        "image_mask": torch.rand(B, N, generator=torch.Generator().manual_seed(1)) > share,
        "text_mask": torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > share,
    }
    return some if operation == "bidirectional_attention" else {"attn_mask": some["text_mask"]}


def everything(function, tensors, **options):
    """The results, and the gradients that flow back from them."""
    tensors = [t.detach().requires_grad_() if t is not None else None for t in tensors]
    found = function(*tensors, **options)
    found = found if isinstance(found, tuple) else (found,)
    grads = [draw(*f.shape, seed=5 + i).bfloat16().to(f.dtype) for i, f in enumerate(found)]
    return *found, *torch.autograd.grad(found, [t for t in tensors if t is not None], grads)


def standard(operation, tensors, **options):
    names = inspect.signature(getattr(mmk, operation)).parameters
    return standard_of(operation, {**dict(zip(names, tensors)), **options})


def check(operation, tensors, **options):
    """Against the definition in float64, forward and backward."""
    return tuple(assert_meets(standard(operation, tensors, **options), operation, "triton").values())


def processors(monkeypatch, count):
    """A device of so many processors: short sides are split, and their parts merged."""
    from mmkernels.triton import heads

    monkeypatch.setattr(heads, "processors", lambda tensor: count)


SHAPES = (
    (1, 1, 20, 600, 24, 8),
    (1, 2, 75, 70, 40, 33),
    (1, 1, 35, 50, 70, 20),
    (1, 1, 20, 40, 20, 70),
    (1, 1, 300, 3, 8, 12),
)


@interpreted
@on_both
@pytest.mark.parametrize("count", (1, 100), ids=("whole", "split"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(operation, shape, count, monkeypatch):
    """Many tiles, many chunks, channels in blocks of which one side has more."""
    processors(monkeypatch, count)
    check(operation, inputs(operation, shape), **masks(operation, shape))


@interpreted
@on_both
@on_every_dtype
def test_types(operation, dtype, monkeypatch):
    processors(monkeypatch, 50)
    shape = (1, 1, 75, 150, 40, 24)
    check(operation, inputs(operation, shape, dtype), **masks(operation, shape))


@interpreted
@pytest.mark.parametrize("mask", ("pairs", "bias", "-inf", "rows", None))
@pytest.mark.parametrize("gated", (True, False))
def test_pairs_and_bias(mask, gated, monkeypatch):
    processors(monkeypatch, 50)
    shape = (2, 1, 20, 150, 12, 20)
    query, key, value, gate = inputs("gated_cross_attention", shape)
    bias = draw(1, 1, 20, 150)
    attn_mask = {
        "pairs": bias > 0,
        "bias": bias,
        "-inf": bias.masked_fill(bias < 0, float("-inf")),
        "rows": draw(2, 1, 20, 1) > 0,
        None: None,
    }[mask]
    check("gated_cross_attention", (query, key, value, gate if gated else None), attn_mask=attn_mask)


@interpreted
@pytest.mark.parametrize("count", (1, 50), ids=("whole", "split"))
def test_gradient_of_the_bias(count, monkeypatch):
    processors(monkeypatch, count)
    tensors = (*inputs("gated_cross_attention", (1, 1, 20, 150, 12, 70)), draw(1, 1, 20, 150))
    for only in (False, True):

        def compute(function, *tensors):
            *features, bias = (t.detach().requires_grad_(not only or i == 4) for i, t in enumerate(tensors))
            result = function(*features, attn_mask=bias)
            return torch.autograd.grad(result.square().sum(), [bias] if only else [*features, bias])

        assert_computes(compute, "gated_cross_attention", "triton", tensors)


@interpreted
@on_both
@pytest.mark.parametrize("view", ("rows apart", "channels apart", "transposed", "expanded", "projection", "unaligned"))
def test_views(operation, view, monkeypatch):
    processors(monkeypatch, 50)
    shape = (2, 1, 20, 135, 12, 12)
    change = {
        "rows apart": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
        "channels apart": lambda t: t.repeat_interleave(2, 3)[..., 1::2],
        "transposed": lambda t: t.mT.contiguous().mT,
        "expanded": lambda t: t[:1].expand(t.shape),
        "projection": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "unaligned": lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape),
    }[view]
    check(operation, [change(t) for t in inputs(operation, shape)], **masks(operation, shape))


@interpreted
@on_both
@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_masked_out_reaches_nothing(operation, poison, monkeypatch):
    """The same bits whatever is there; the gradient of what counted as 0 is 0."""
    processors(monkeypatch, 50)
    shape = (1, 1, 135, 70, 12, 40)
    tensors = inputs(operation, shape)
    some = masks(operation, shape)
    text = some.get("text_mask", some.get("attn_mask"))
    hidden = {
        name: ~mask[:, None, :, None]
        for name, mask in (("image", some.get("image_mask")), ("text", text))
        if mask is not None
    }
    where = (
        ("image", "text", "image", "text") if operation == "bidirectional_attention" else (None, "text", "text", None)
    )
    fill = lambda value: [t.masked_fill(hidden[side], value) if side else t for t, side in zip(tensors, where)]
    run = functools.partial(getattr(mmk, operation), backend="triton", **some)
    dirty = everything(run, fill(poison))
    clean = everything(run, fill(0))
    gradients = len(dirty) - 4
    for i, (a, b) in enumerate(zip(dirty, clean)):
        side = where[i - gradients] if i >= gradients else None
        if side:
            assert not a.masked_select(hidden[side]).any()
            a = a.masked_fill(hidden[side], 0)
            b = b.masked_fill(hidden[side], 0)
        assert torch.equal(a, b)


@interpreted
@on_both
@pytest.mark.parametrize("count", (1, 50), ids=("whole", "split"))
def test_nothing_takes_part(operation, count, monkeypatch):
    """Zeros, exactly, in the sample that has nothing; the other one isn't touched."""
    processors(monkeypatch, count)
    shape = (2, 1, 70, 66, 12, 8)
    some = {name: mask & torch.tensor([[False], [True]]) for name, mask in masks(operation, shape).items()}
    found = check(operation, inputs(operation, shape), **some)
    assert all(not f[0].any() and f[1].any() for f in found)


@interpreted
@pytest.mark.parametrize("count", (1, 50), ids=("whole", "split"))
def test_kept_softmax(count, monkeypatch):
    """Its largest score, and one over the sum of the exponentials below it: the largest weight."""
    processors(monkeypatch, count)
    query, key, value, gate = inputs("gated_cross_attention", (1, 2, 9, 140, 12, 8))
    mmk.gated_cross_attention(query, key, value, backend="triton")
    pairs = draw(1, 2, 9, 140) > 0
    pairs[:, :, 3] = False
    tensors = (query, key, value, gate)
    some = pairs.any(3)
    result, attended, softmax = torch.ops.mmkernels.gated_cross_attention_triton(
        *tensors, pairs.any(2), pairs, None, 0.7, True
    )

    def plain(query, key, value, gate):
        scores = (0.7 * query @ key.mT).masked_fill(~pairs, float("-inf"))
        weights = scores.softmax(3).nan_to_num(0)
        largest = scores.amax(3)
        return weights @ value * gate, weights @ value, largest.where(some, 0), weights.amax(3)

    found = result, attended, softmax[:, :, 0].where(some, 0), softmax[:, :, 1]
    assert_rule(found, truth=plain(*(t.double() for t in tensors)), peer=plain(*tensors))
    assert not attended[:, :, 3].any()


@interpreted
@on_both
def test_same_bits_every_time(operation, monkeypatch):
    processors(monkeypatch, 50)
    shape = (1, 1, 135, 70, 12, 8)
    run = functools.partial(getattr(mmk, operation), backend="triton", **masks(operation, shape))
    first, second = (everything(run, inputs(operation, shape)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@interpreted
@on_both
@pytest.mark.parametrize("count", (1, 50), ids=("whole", "split"))
def test_nothing_is_written_beside_a_tensor(operation, count, monkeypatch):
    """Results, gradients and scratch: every tensor that the operation allocates lies between guards."""
    shape = (1, 2, 75, 70, 13, 37)
    tensors = inputs(operation, shape)
    some = masks(operation, shape)
    getattr(mmk, operation)(*tensors, backend="triton")  # brings the operations
    processors(monkeypatch, count)
    guards = Guards()
    module = importlib.import_module(f"mmkernels.triton.{operation}")
    place_heads = lambda like, channels: guards.place((*like.shape[:3], channels), like.dtype)
    monkeypatch.setattr(module, "empty_heads", place_heads)
    guards.place_fresh(monkeypatch)
    operations = torch.ops.mmkernels
    if operation == "gated_cross_attention":
        arguments = (*tensors, some["attn_mask"][:, None].expand(1, 2, 70), None, None, 0.3)
        result, attended, log_sum = operations.gated_cross_attention_triton(*arguments, True)
        grads = operations.gated_cross_attention_triton_backward(
            result, *arguments[:7], attended, log_sum, 0.3, True, *(True,) * 5
        )[:4]
        produced = (result, attended, log_sum)
    else:
        arguments = (*tensors, some["image_mask"], some["text_mask"])
        produced = operations.bidirectional_attention_triton(*arguments, 0.3)
        grads = operations.bidirectional_attention_triton_backward(
            *produced[:2], *arguments, *produced[:4], 0.3, *(True,) * 4
        )
    assert len(guards.bases) >= 7 and guards.intact()
    for tensor in (*produced, *grads):
        assert not (tensor == 77).any()


@interpreted
@on_both
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(operation, wanted):
    """What isn't wanted isn't computed; bidirectional: also where only one result has a gradient."""
    tensors = inputs(operation, (1, 2, 40, 21, 12, 8))
    for flows in (0, 1) if operation == "bidirectional_attention" else (0,):

        def compute(function, *tensors):
            tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
            result = function(*tensors)
            result = result if isinstance(result, torch.Tensor) else result[flows]
            if not result.requires_grad:  # a value has part in one result only
                return torch.zeros_like(tensors[wanted])
            upstream = draw(*result.shape, seed=3).to(result.dtype)
            return torch.autograd.grad(result, tensors[wanted], upstream, allow_unused=True, materialize_grads=True)

        assert_computes(compute, operation, "triton", tensors)


@interpreted
@on_both
@pytest.mark.slow
@on_every_dtype
def test_every_configuration_gives_the_same(operation, dtype, monkeypatch):
    """Whatever a GPU finds fastest."""
    shape = (1, 1, 70, 40, 70, 20)
    tensors = inputs(operation, shape, dtype)
    some = masks(operation, shape)
    module = importlib.import_module(f"mmkernels.triton.{operation}")
    processors(monkeypatch, 20)
    for i in range(3):
        monkeypatch.setattr(
            module, "tuned", lambda key, configurations, tensor, run: configurations[i % len(configurations)]
        )
        check(operation, tensors, **some)


@interpreted
@on_both
@pytest.mark.skipif(backends.extension is None, reason="the C++ operations aren't built")
@pytest.mark.parametrize("suffix", ("", "_backward"))
def test_schema_is_that_of_the_other_backends(operation, suffix):
    getattr(mmk, operation)(*inputs(operation, (1, 1, 1, 1, 1, 1)), backend="triton")
    schema = lambda name: str(getattr(torch.ops.mmkernels, name + suffix).default._schema).replace(name, operation)
    assert schema(f"{operation}_triton") == schema(operation)


@pytest.mark.property("opcheck", "opcheck backward", backend="triton")
@interpreted
@on_both
@pytest.mark.slow
def test_opcheck(operation):
    shape = (2, 2, 7, 5, 6, 4)
    tensors = [t.requires_grad_() for t in inputs(operation, shape)]
    some = masks(operation, shape)
    getattr(mmk, operation)(*tensors, backend="triton")
    run, back = (getattr(torch.ops.mmkernels, f"{operation}_triton{suffix}").default for suffix in ("", "_backward"))
    if operation == "gated_cross_attention":
        arguments = (*tensors, None, None, draw(2, 2, 7, 5).requires_grad_())
        torch.library.opcheck(run, (*arguments, 0.3, True))
        result, *kept = (t.detach() for t in run(*arguments, 0.3, True))
        torch.library.opcheck(back, (result, *arguments, *kept, 0.3, True, *(True,) * 5))
    else:
        arguments = (*tensors, *some.values())
        torch.library.opcheck(run, (*arguments, 0.3))
        kept = [t.detach() for t in run(*arguments, 0.3)]
        torch.library.opcheck(back, (*kept[:2], *arguments, *kept[:4], 0.3, *(True,) * 4))


@pytest.mark.property("mistakes of a kernel's caller", backend="triton")
@interpreted
@on_both
@pytest.mark.parametrize("wrong", range(1, 4))
def test_operation_refuses_what_would_not_be_safe(operation, wrong):
    tensors = inputs(operation, (1, 2, 7, 5, 6, 4))
    getattr(mmk, operation)(*tensors, backend="triton")
    tensors[wrong] = tensors[wrong][:, :, :-1] if wrong != 1 else tensors[wrong][..., :-1]
    rest = (None, None, None, 0.3, True) if operation == "gated_cross_attention" else (None, None, 0.3)
    with pytest.raises(RuntimeError, match="must be"):
        getattr(torch.ops.mmkernels, f"{operation}_triton")(*tensors, *rest)


@interpreted
@on_both
def test_float64_is_refused(operation):
    with pytest.raises(mmk.BackendError, match="triton: it has no float64"):
        getattr(mmk, operation)(*inputs(operation, (1, 1, 2, 2, 2, 2), torch.float64), backend="triton")
