"""Spatial attention in Triton, interpreted on the CPU, against the float64 reference: what the cases of all backends
don't reach."""

import functools
import itertools

import pytest
import torch
from support.attention_tests import assert_computes, assert_meets, standard_of
from support.triton_tests import Guards, draw, interpreted, on_every_dtype

import mmkernels as mmk

OPERATION = "spatial_attention"
both_ways = pytest.mark.parametrize("combine", ["multiply", "pool"])
run = functools.partial(mmk.spatial_attention, backend="triton", need_weights=True)


def unaligned(*shape, dtype=torch.float32, seed=0):
    """One element past the start of its storage."""
    base = torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)
    base[1:] = draw(*shape, dtype=dtype, seed=seed).flatten()
    return base[1:].view(shape)


def everything(function, image, text, grads, **options):
    """Result, weights, and the gradients that flow back from both."""
    image = image.detach().requires_grad_()
    text = text.detach().requires_grad_()
    outputs = function(image, text, **options)
    return *outputs, *torch.autograd.grad(
        outputs, (image, text), [g.to(o.dtype).view(o.shape) for g, o in zip(grads, outputs)]
    )


def standard(image, text, **options):
    return standard_of(OPERATION, {"image": image, "text": text, **options, "need_weights": True})


def check(image, text, **options):
    """Against the definition in float64, forward and backward."""
    return tuple(assert_meets(standard(image, text, **options), OPERATION, "triton").values())


SHAPES = ((1, 1, 1), (2, 1, 3), (3, 5, 1), (1, 37, 257), (1, 300, 257), (2, 9, 40), (1, 1100, 24))


@interpreted
@both_ways
@on_every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape, dtype, combine):
    check(unaligned(*shape, dtype=dtype), unaligned(shape[0], shape[2], dtype=dtype, seed=1), combine=combine)


@interpreted
@both_ways
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((3, 17, 12), torch.float32),
        ((3, 17, 12), torch.bfloat16),
        ((3, 17, 12), torch.float16),
        ((1, 1100, 48), torch.float32),
    ],
    ids=str,
)
def test_masked_heads_rescaled(shape, dtype, combine):
    """NaN at masked positions reaches nothing."""
    image = unaligned(*shape, dtype=dtype)
    mask = draw(*shape[:2], seed=2) > 0
    image[~mask] = float("nan")
    result, weights, image_grad, text_grad = (
        found.clone()
        for found in everything(
            run,
            image,
            draw(shape[0], shape[2], dtype=dtype),
            (
                torch.ones(()).expand(shape if combine == "multiply" else (shape[0], shape[2])),
                torch.ones(()).expand(shape[0], 4, shape[1]),
            ),
            mask=mask,
            num_heads=4,
            rescale=True,
            combine=combine,
        )
    )
    for found in (result, weights, image_grad, text_grad):
        assert bool(found.isfinite().all())
    assert not weights[~mask[:, None].expand_as(weights)].any() and not image_grad[~mask].any()
    check(
        image.masked_fill(~mask[..., None], 0),
        draw(shape[0], shape[2], dtype=dtype),
        mask=mask,
        num_heads=4,
        rescale=True,
        combine=combine,
    )


VIEWS = {
    "transposed": lambda dtype: (draw(2, 12, 30, dtype=dtype).mT, {}),
    "rows apart": lambda dtype: (draw(2, 60, 14, dtype=dtype)[:, ::2, 1:-1], {}),
    "channels apart": lambda dtype: (draw(2, 30, 24, dtype=dtype)[..., ::2], {}),
    "expanded": lambda dtype: (draw(1, 1, 12, dtype=dtype).expand(2, 30, 12), {}),
    "planes": lambda dtype: (draw(2, 12, 5, 7, dtype=dtype), {"layout": "bdhw"}),
    "one column": lambda dtype: (draw(2, 12, 35, 4, dtype=dtype)[..., 1:2], {"layout": "bdhw"}),
    "channels last": lambda dtype: (draw(2, 5, 7, 12, dtype=dtype).permute(0, 3, 1, 2), {"layout": "bdhw"}),
    "window": lambda dtype: (draw(2, 12, 9, 9, dtype=dtype)[:, :, 2:7, 1:8], {"layout": "bdhw"}),
    "large window": lambda dtype: (draw(1, 12, 52, 44, dtype=dtype)[:, :, 1:-1, 2:-2], {"layout": "bdhw"}),
    "large planes": lambda dtype: (draw(1, 12, 50, 40, dtype=dtype), {"layout": "bdhw"}),
}


@interpreted
@both_ways
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, combine):
    image, options = VIEWS[view](torch.float32)
    text = draw(12, image.shape[0], seed=1).mT
    mask = draw(*(image.shape[:2] if image.dim() == 3 else (image.shape[0], *image.shape[:1:-1])), seed=3) > -0.5
    mask = mask if image.dim() == 3 else mask.mT
    check(image, text, mask=mask, num_heads=3, combine=combine, **options)


BAGS = ((0, 1, 37, 0, 0, 5, 16, 0), (1, 1200, 0, 700, 3), (0, 0), (1,) * 5, (2049,), ())


@interpreted
@both_ways
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bags", BAGS, ids=str)
def test_packed(bags, combine, masked):
    offsets = torch.tensor([0, *torch.tensor(bags, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    image = unaligned(sum(bags), 22)
    text = draw(len(bags), 22, seed=1)
    options = {"mask": draw(sum(bags), seed=2) > 0.5} if masked else {}
    found = check(image, text, offsets=offsets, combine=combine, num_heads=2, rescale=masked, **options)
    if combine == "pool":
        empty = [i for i, bag in enumerate(bags) if bag == 0]
        assert not found[0][empty].any() and not found[3][empty].any()


@interpreted
@both_ways
@pytest.mark.parametrize("length", [0, 9, 2100])
def test_nothing_takes_part(length, combine):
    """Zeros, exactly; the other sample isn't touched."""
    image = draw(2, length, 12)
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, 3:] = True
    image[0] = float("nan")
    result, weights, image_grad, text_grad = everything(
        run,
        image,
        draw(2, 12),
        (torch.ones(2, 12) if combine == "pool" else torch.ones(2, length, 12), torch.ones(2, 1, length)),
        mask=mask,
        combine=combine,
    )
    for found in (result, weights, image_grad, text_grad):
        assert not found[0].any() and bool(found.isfinite().all())


@interpreted
@both_ways
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("length", [7, 2100])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_extreme_scores(value, length, combine, all_of_them):
    """One or all scores -Inf, Inf or NaN: as softmax."""
    image = draw(2, length, 3)
    text = torch.ones(2, 3)
    image[0, slice(None) if all_of_them else 2, 1] = value
    call = lambda function, *tensors: function(*tensors, combine=combine, need_weights=True)
    assert_computes(call, OPERATION, "triton", (image, text))


class Guarded:
    """A tensor inside a larger one; what lies around it must keep its value."""

    def __init__(self, shape, dtype):
        self.base = torch.full([n + 6 for n in shape], 77.0, dtype=dtype)
        inside = tuple(slice(3, 3 + n) for n in shape)
        self.tensor, self.outside = self.base[inside], torch.ones(self.base.shape, dtype=torch.bool)
        self.outside[inside] = False

    def intact(self):
        return bool((self.base[self.outside] == 77).all())


@interpreted
@both_ways
@on_every_dtype
@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 2100, 20), (2050, 12)], ids=str)
def test_out(shape, dtype, combine):
    """Written where it lies, and nothing beside it; for multiply also over the image."""
    image = draw(*shape, dtype=dtype)
    packed = len(shape) == 2
    bags = 3 if packed else shape[0]
    text = draw(bags, shape[-1], dtype=dtype, seed=1)
    options = {"combine": combine}
    if packed:
        options["offsets"] = torch.tensor([0, 7, 7, shape[0]])
    expected, weights = run(image, text, **options)
    guarded = Guarded(expected.shape, dtype)
    with torch.no_grad():
        found = run(image, text, out=guarded.tensor, **options)
        assert found[0] is guarded.tensor and guarded.intact()
        assert torch.equal(found[0], expected) and torch.equal(found[1], weights)
        if combine == "multiply":
            guarded.tensor.copy_(image)
            assert (
                torch.equal(run(guarded.tensor, text, out=guarded.tensor, **options)[0], expected) and guarded.intact()
            )


@interpreted
@both_ways
@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 2100, 20), (2050, 12)], ids=str)
def test_nothing_is_written_beside_a_tensor(shape, combine, monkeypatch):
    """Weights, gradients and scratch, too: every tensor that the operation allocates lies between guards."""
    guards = Guards()
    guards.place_fresh(monkeypatch)
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: guards.place(t.shape, t.dtype, t.stride()))
    image, packed = draw(*shape), len(shape) == 2
    offsets = torch.tensor([0, 7, 7, shape[0]]) if packed else None
    text = draw(3 if packed else shape[0], shape[-1], seed=1)
    options = (None, offsets, 0.3, 1, combine == "pool", False)
    result, weights = torch.ops.mmkernels.spatial_attention_triton(image, text, *options)
    grads = torch.ops.mmkernels.spatial_attention_triton_backward(
        result, weights, image, text, *options[:2], weights, *options[2:], True, True
    )
    assert len(guards.bases) >= 4 and guards.intact()
    for tensor in (result, weights, *grads):
        assert not (tensor == 77).any()


@interpreted
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("flows", [(True, False), (False, True)])
@pytest.mark.parametrize("length", [9, 2100])
def test_part_of_the_gradients(length, flows, needs):
    """Only one input wants a gradient, or only one output has one."""

    def compute(function, *tensors):
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs)]
        (output,) = itertools.compress(function(*inputs, num_heads=2, need_weights=True), flows)
        return torch.autograd.grad(
            output, itertools.compress(inputs, needs), draw(*output.shape, seed=3).to(output.dtype)
        )

    assert_computes(compute, OPERATION, "triton", (draw(1, length, 12), draw(1, 12, seed=1)))


@interpreted
def test_wrong_offsets_touch_no_foreign_memory():
    """A GPU can't refuse them without waiting: the results are wrong, the tensors around keep their values."""
    run(draw(1, 1, 1), draw(1, 1))  # brings the operations
    for bounds in ((0, 9000, 40), (5, 2050, 7), (-70, -3, 2049), (2050, 0, 2050)):
        guarded = Guarded((2050, 4), torch.float32)
        torch.ops.mmkernels.spatial_attention_triton_out(
            draw(2050, 4), draw(2, 4), None, torch.tensor(bounds), 1.0, 1, False, False, guarded.tensor
        )
        assert guarded.intact()


@interpreted
@pytest.mark.slow
@both_ways
def test_every_configuration_gives_the_same(combine, monkeypatch):
    """Whatever a GPU finds fastest, and however many processors it has."""
    from mmkernels.triton import spatial_attention as kernels

    image = draw(1, 600, 130)
    text = draw(1, 130, seed=1)
    mask = draw(1, 600, seed=2) > 0
    wanted = standard(image, text, mask=mask, num_heads=2, combine=combine)
    for processors in (1, 200):
        monkeypatch.setattr(kernels, "processors", lambda tensor: processors)
        for i in range(max(len(kernels.FORWARD), len(kernels.BACKWARD))):
            monkeypatch.setattr(
                kernels, "tuned", lambda key, configurations, tensor, run: configurations[i % len(configurations)]
            )
            assert_meets(wanted, OPERATION, "triton")


@interpreted
def test_tuning():
    """Measured once a key; the fastest wins; the result may be the image, which is measured elsewhere."""
    from mmkernels.triton import common
    from mmkernels.triton import spatial_attention as kernels

    measured = []

    def measure(repeat):
        repeat(), repeat()
        measured.append(True)
        return -len(measured)

    tuned = lambda key, configurations, tensor, run: common.tuned(("test", *key), configurations, tensor, run, measure)
    image = draw(2, 9, 12)
    text = draw(2, 12, seed=1)
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "tuned", lambda *arguments: chosen.append(tuned(*arguments)) or chosen[-1])
        for _ in range(2):
            out = image.clone()
            run(out, text, out=out)
            assert_computes(
                lambda function, *tensors: function(*tensors), OPERATION, "triton", (image, text), found=out
            )
    assert len(measured) == len(kernels.FORWARD) and chosen == [kernels.FORWARD[-1]] * 2
    assert common.tuned("none", kernels.FORWARD, image, None) == kernels.FORWARD[0]


@interpreted
def test_same_bits_every_time():
    image = draw(1, 2100, 24)
    text = draw(1, 24, seed=1)
    grads = (draw(1, 2100, 24), draw(1, 1, 2100))
    first, second = (everything(run, image, text, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
