"""Channel and additive attention in Triton, interpreted: what the cases of all backends don't reach.

`make test-triton` runs it; see test_triton.py.
"""

import functools
import importlib.util

import pytest
import torch
from support.attention_tests import assert_computes, assert_meets, assert_rule, standard_of
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mmk
from mmkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

interpreted = pytest.mark.skipif(not backends.INTERPRETED, reason="mmkernels was imported without TRITON_INTERPRET=1")
on_every_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d).removeprefix("torch.")
)
CHANNEL = "channel_attention"
ADDITIVE = "additive_attention"


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def channel(shape, dtype=torch.float32, text=5):
    """image, text, weight, bias"""
    B, _, D = shape
    return [
        draw(*shape, dtype=dtype),
        draw(B, text, dtype=dtype, seed=1),
        draw(D, D + text, dtype=dtype, seed=2) * D**-0.5,
        draw(D, dtype=dtype, seed=3),
    ]


NAMES = ("image", "query", "w_image", "w_query", "v", "bias", "w_gate", "bias_gate")


def additive(shape, hidden, maps=1, bags=None, dtype=torch.float32):
    """The tensors of NAMES."""
    B, D = bags or shape[0], shape[-1]
    sizes = (shape, (B, 5), (hidden, D), (hidden, 5), (maps, hidden), (hidden,), (hidden, D), (hidden,))
    return [
        draw(*size, dtype=dtype, seed=i) * (size[1] ** -0.5 if i in (2, 3, 4, 6) else 1) for i, size in enumerate(sizes)
    ]


def function(operation, module, **options):
    if operation == CHANNEL:
        return functools.partial(getattr(module, operation), **options)
    return lambda *tensors: getattr(module, operation)(**dict(zip(NAMES, tensors)), **options)


def everything(run, tensors):
    """Result and weights, and the gradients that flow back from them."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    found = run(*tensors)
    grads = [draw(*f.shape, seed=5 + i).bfloat16().to(f.dtype) for i, f in enumerate(found)]
    return *(f.detach() for f in found), *torch.autograd.grad(found, tensors, grads)


def check(operation, tensors, **options):
    """Against the definition in float64, forward and backward."""
    names = ("image", "text", "weight", "bias") if operation == CHANNEL else NAMES
    arguments = {**dict(zip(names, tensors)), **options, "need_weights": True}
    return tuple(assert_meets(standard_of(operation, arguments), operation, "triton").values())


def assert_formula(formula, tensors, found):
    """`found` is ``formula(*tensors)`` in float64, as near as it is in float32."""
    assert_rule(found, truth=formula(*(t.double() for t in tensors)), peer=formula(*tensors))


def panels_of(monkeypatch, values):
    """Panels of so many float32 values, at least 16 rows: they begin and end within samples."""
    from mmkernels.triton import rows

    monkeypatch.setattr(rows, "PANEL_BYTES", values * 4)


def processors(monkeypatch, count):
    """A device of so many: samples of 256 rows and more are split, and their sums merged."""
    from mmkernels.triton import additive_attention

    monkeypatch.setattr(additive_attention, "processors", lambda tensor: count)


VIEWS = {
    "contiguous": lambda t: t,
    "rows apart": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "channels apart": lambda t: t.repeat_interleave(2, 2)[..., 1::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 1, 2, 2), value=77.0)[:, 2:-2, 1:-1],
    "transposed": lambda t: t.mT.contiguous().mT,
    "one sample for all": lambda t: t[:1].expand(t.shape),
    "one row for all": lambda t: t[:, :1].expand(t.shape),
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


@interpreted
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "shape", ((1, 50, 5), (7, 3, 5), (3, 21, 5), (5, 16, 5), (2, 40, 5), (64, 1, 5), (3, 48, 5)), ids=str
)
def test_a_panel_is_its_rows(view, shape, monkeypatch):
    """Whatever the strides: those rows, and no copy of more."""
    from mmkernels.triton.rows import Rows

    panels_of(monkeypatch, 64)
    image = VIEWS[view](draw(*shape))
    part = draw(*shape[:2], seed=1) > 0
    for mask in (None, part):
        rows = Rows(image, mask)
        expected = image if mask is None else image.where(mask[..., None], 0)
        ranges = rows.panels(4)
        assert [b for _, b in ranges[:-1]] == [a for a, _ in ranges[1:]] and (ranges[0][0], ranges[-1][1]) == (
            0,
            rows.count,
        )
        for first, last in ranges:
            panel = rows.panel(first, last)
            assert torch.equal(panel, expected.reshape(-1, 5)[first:last])
            assert (
                panel.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
                or panel.untyped_storage().nbytes() <= panel.numel() * 4
            )


@interpreted
@on_every_dtype
@pytest.mark.parametrize("view", ("contiguous", "window"))
def test_channel_panels(view, dtype, monkeypatch):
    panels_of(monkeypatch, 20 * 24)
    image, *others = channel((3, 37, 24), dtype)
    check(CHANNEL, (VIEWS[view](image), *others))


@interpreted
@pytest.mark.parametrize("channels", (1, 2047, 2048, 2049, 4500))
def test_wide_channels(channels):
    """Rows that fit a program, and such as are walked."""
    image, *others = channel((1, 3, channels), text=2)
    check(CHANNEL, (image, *others))


ADDITIVE_OPTIONS = {
    "pool": ((3, 37, 11), None, {}),
    "multiply": ((3, 37, 11), None, {"combine": "multiply"}),
    "packed": ((111, 11), (0, 40, 40, 41, 111), {}),
    "packed multiply": ((111, 11), (0, 40, 40, 41, 111), {"combine": "multiply"}),
}


@interpreted
@on_every_dtype
@pytest.mark.parametrize("way", ADDITIVE_OPTIONS)
def test_additive_panels(way, dtype, monkeypatch):
    """Panels, masks and bags that don't end together."""
    shape, offsets, options = ADDITIVE_OPTIONS[way]
    panels_of(monkeypatch, 20 * 18)
    tensors = additive(shape, 9, 1 if "combine" in options else 3, offsets and len(offsets) - 1, dtype)
    if offsets is None:
        tensors[0] = VIEWS["window"](tensors[0])
    else:
        options = {**options, "offsets": torch.tensor(offsets)}
    check(ADDITIVE, tensors, mask=draw(*shape[:-1], seed=8) > -0.3, activation="gelu", **options)


@interpreted
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_split_samples(packed, masked, monkeypatch):
    """Sums over a sample come from several programs."""
    processors(monkeypatch, 8)
    shape, options = ((2, 700, 6), {}) if not packed else ((1400, 6), {"offsets": torch.tensor([0, 1033, 1033, 1400])})
    mask = {"mask": draw(*shape[:-1], seed=8) > 0.5} if masked else {}
    check(ADDITIVE, additive(shape, 4, 2, 3 if packed else None), **options, **mask)


@interpreted
@pytest.mark.parametrize("maps, hidden, channels", ((1, 1, 1), (40, 3, 2), (3, 130, 5), (2, 5, 150)))
def test_sizes(maps, hidden, channels):
    check(ADDITIVE, additive((2, 20, channels), hidden, maps))


@interpreted
@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
@pytest.mark.parametrize("way", ADDITIVE_OPTIONS)
def test_masked_out_reaches_nothing(way, poison, monkeypatch):
    """The same bits whatever is there, the shared gradients included."""
    shape, offsets, options = ADDITIVE_OPTIONS[way]
    panels_of(monkeypatch, 20 * 18)
    tensors = additive(shape, 9, bags=offsets and len(offsets) - 1)
    mask = draw(*shape[:-1], seed=8) > 0
    mask[: 40 if offsets else 1] = False  # a whole sample, too
    options = {
        **options,
        **({"offsets": torch.tensor(offsets)} if offsets else {}),
        "mask": mask,
        "need_weights": True,
        "backend": "triton",
    }
    dirty, clean = (
        everything(function(ADDITIVE, mmk, **options), (tensors[0].masked_fill(~mask[..., None], value), *tensors[1:]))
        for value in (poison, 0)
    )
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(dirty, clean))
    assert not dirty[2].masked_select(~mask[..., None]).any() and dirty[2].any()


@interpreted
@pytest.mark.parametrize("value", (float("inf"), float("-inf"), float("nan")))
def test_extreme_scores(value):
    """One or all scores Inf, -Inf or NaN: as softmax."""
    image = draw(2, 9, 4)
    for some in (2, slice(None)):
        bias_hidden, scores = draw(2, 4), draw(2, 9)
        bias_hidden[0, some], scores[0, some] = value, value
        mmk.channel_attention(*channel((1, 1, 1)), backend="triton")  # brings the operations
        tensors = image, bias_hidden, torch.zeros(4, 4)
        result, weights, _ = torch.ops.mmkernels.channel_attention_triton(*tensors, True, 0)
        assert_formula(lambda *t: mmk.ops.channel_attention._reference(*t, True, 0)[:2], tensors, (result, weights))
        assert_formula(lambda scores: scores.softmax(1), [scores], normalised(scores))


def normalised(scores):
    """`normalise` alone, of [B, N] scores."""
    from mmkernels.triton import additive_attention, additive_tiles
    from mmkernels.triton.common import launch

    batch, count = scores.shape
    weights = torch.empty_like(scores)
    launch(
        additive_attention.normalise,
        (batch, 1),
        scores,
        additive_tiles.Weights(weights, count, count),
        scores,
        scores,
        torch.arange(0, scores.numel() + 1, count),
        scores.numel(),
        1,
        PACKED=False,
        MASKED=False,
        GIVE=False,
        BLOCK=16,
    )
    return weights


@interpreted
@pytest.mark.virtual_memory
def test_many_weights():
    """Map 2's weights begin at 2^31, past what 32 bits hold."""
    from mmkernels.triton import additive_attention, additive_tiles
    from mmkernels.triton.common import launch

    step, scores = 2**30, draw(5, 3)
    weights = torch.empty(2 * step + 5)
    placed = additive_tiles.Weights(weights, 0, step)
    launch(
        additive_attention.normalise,
        (1, 3),
        scores,
        placed,
        scores,
        scores,
        torch.tensor([0, 5]),
        5,
        3,
        PACKED=True,
        MASKED=False,
        GIVE=False,
        BLOCK=16,
    )
    assert_formula(
        lambda scores: scores.softmax(0).T, [scores], torch.stack([weights[k * step : k * step + 5] for k in range(3)])
    )
    partial = torch.empty(1, 1, 3, 2)
    image = draw(5, 2)
    features = additive_tiles.Image(image, 0, 2, 1)
    first_row = additive_tiles.ResultGrad(image, 0, 0, 0, 1)  # for all
    launch(
        additive_attention.pool,
        (1, 1, 3),
        placed,
        features,
        torch.tensor([0, 5]),
        partial,
        5,
        3,
        2,
        1,
        PACKED=True,
        BLOCK_N=16,
        BLOCK_C=2,
    )
    assert_formula(lambda scores, image: scores.softmax(0).T @ image, [scores, image], partial[0, 0])
    found = torch.empty(3, 5)
    launch(
        additive_attention.differentiate_weights,
        (1, 3),
        placed,
        features,
        first_row,
        image,
        torch.tensor([0, 5]),
        found,
        5,
        3,
        2,
        1,
        PACKED=True,
        GRAD=True,
        GIVEN=False,
        BLOCK_N=16,
        BLOCK_C=2,
    )
    assert_formula(lambda image: (image @ image[0]).expand(3, 5), [image], found)
    result = torch.empty(5, 2)
    through = torch.zeros(5, 2)
    launch(
        additive_attention.combine,
        (1, 1),
        through,
        placed,
        first_row,
        image,
        torch.zeros(5, dtype=torch.int32),
        torch.tensor([0, 5]),
        result,
        5,
        3,
        2,
        0,
        PACKED=True,
        GRAD=True,
        MASKED=False,
        BLOCK_N=16,
        BLOCK_C=2,
    )
    assert_formula(lambda scores, image: scores.softmax(0).sum(1)[:, None] * image[0], [scores, image], result)


class Allocations(TorchDispatchMode):
    """Bytes of the largest memory that comes up beside that of `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known if isinstance(t, torch.Tensor)}
        self.largest = 0

    def __torch_dispatch__(self, called, types, arguments=(), options=None):
        found = called(*arguments, **(options or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return found


@interpreted
@pytest.mark.parametrize("hidden", (1, 40))
def test_scratch_is_a_few_panels(hidden, monkeypatch):
    """Nothing of the image's size but results, however narrow the hidden layer and however the image lies."""
    from mmkernels.triton import additive_attention, channel_attention

    panels_of(monkeypatch, 32 * 16)
    shape = (2, 500, 64)
    image = VIEWS["window"](draw(*shape))
    mask = draw(2, 500, seed=1) > 0
    inputs = (
        image,
        draw(2, hidden),
        draw(hidden, 64),
        draw(1, hidden),
        draw(hidden, 64, seed=1),
        draw(hidden),
        mask,
        None,
        None,
    )
    with Allocations(inputs) as mode:
        result, weights, scores, kept = additive_attention.forward(*inputs, 0, True, 0.0, True, 0)
        additive_attention.backward(
            result, weights, scores, *inputs, weights, kept, 0, True, 0.0, True, 0, False, *[True] * 5
        )
    assert mode.largest <= max(8 * 512, 40 * 64) * 4 < image.numel()
    inputs = image[..., :32], draw(2, 32), draw(32, 32)
    up = draw(1).expand(2, 500, 32)
    with Allocations((*inputs, up)) as mode:
        channel_attention.backward(up, None, *inputs, None, False, 0, False, True, True)
    assert mode.largest <= 32 * 32 * 4


class Guards:
    """Every tensor that an operation allocates lies between guards; what it doesn't write stays 77."""

    def __init__(self, monkeypatch):
        self.bases = []
        place = lambda t: self.place(t.shape, t.dtype)
        empty = torch.empty
        zeros = torch.zeros
        new_empty = torch.Tensor.new_empty
        monkeypatch.setattr(
            torch, "empty", lambda *size, dtype, device: place(empty(*size, dtype=dtype, device=device))
        )
        monkeypatch.setattr(
            torch, "zeros", lambda *size, dtype, device: place(zeros(*size, dtype=dtype, device=device)).zero_()
        )
        # With a device it is the interpreter that asks.
        monkeypatch.setattr(
            torch.Tensor,
            "new_empty",
            lambda t, *size, **options: new_empty(t, *size, **options) if options else place(new_empty(t, *size)),
        )

    def place(self, shape, dtype):
        room = torch.Size(shape).numel()
        base = torch.full((room + 64,), 77.0, dtype=dtype)
        self.bases.append((base, room))
        return base[32 : 32 + room].view(shape)

    def intact(self):
        return all(bool((base[:32] == 77).all()) and bool((base[32 + room :] == 77).all()) for base, room in self.bases)


@interpreted
@pytest.mark.parametrize("operation", (CHANNEL, *ADDITIVE_OPTIONS))
def test_nothing_is_written_beside_a_tensor(operation, monkeypatch):
    """Results, gradients and scratch, and all of them are written."""
    from mmkernels.triton import additive_attention, channel_attention, rows

    panels_of(monkeypatch, 20 * 18)
    processors(monkeypatch, 8)
    product = rows.product
    for module in (
        additive_attention,
        channel_attention,
    ):  # torch's own products aren't in question: what is written over them is
        monkeypatch.setattr(
            module,
            "product",
            lambda *operands: guards.place((found := product(*operands)).shape, found.dtype).copy_(found),
        )
    if operation == CHANNEL:
        inputs = draw(3, 37, 13), draw(3, 13), draw(13, 13)
        up = draw(3, 37, 13, seed=4), draw(3, 37, 13, seed=5)
        module = channel_attention
        options = (True, 0)
        needs = 3
    else:
        shape, offsets, chosen = ADDITIVE_OPTIONS[operation]
        image, _, w_image, _, v, bias_gate, w_gate, _ = additive(shape, 9, 1 if chosen else 3)
        bags = 3 if offsets is None else 4
        inputs = (
            image,
            draw(bags, 9),
            w_image,
            v,
            w_gate,
            bias_gate,
            draw(*shape[:-1]) > 0,
            None if offsets is None else torch.tensor(offsets),
            torch.tensor(3) if chosen else None,
        )
        module = additive_attention
        options = (0, not chosen, 0.25 if chosen else 0.0, True, 0)
        needs = 6
    guards = Guards(monkeypatch)
    produced = module.forward(*inputs, *options)
    if operation != CHANNEL:
        up = [torch.ones_like(t) for t in produced[:3]]
    kept = produced[2:] if operation == CHANNEL else produced[1::2]
    grads = module.backward(*up, *inputs, *kept, *options, *[True] * needs)
    assert len(guards.bases) >= 8 and guards.intact()
    assert not any((t == 77).any() for t in (*produced, *grads))


@interpreted
@pytest.mark.parametrize("bounds", ((0,), (0, 9000, 40), (5, 40, 7), (-70, -3, 41), (40, 0, 40)), ids=str)
@pytest.mark.parametrize("pooled", (True, False))
def test_wrong_offsets_touch_no_foreign_memory(bounds, pooled, monkeypatch):
    """A GPU can't refuse them without waiting: the results are wrong, the tensors around keep their values."""
    from mmkernels.triton import additive_attention

    image, _, w_image, _, v, bias_gate, w_gate, _ = additive((41, 4), 3)
    guards = Guards(monkeypatch)
    inputs = (
        image,
        guards.place((len(bounds) - 1, 3), torch.float32),
        w_image,
        v,
        w_gate,
        bias_gate,
        None,
        torch.tensor(bounds),
        torch.tensor(3),
    )
    result, weights, scores, kept = additive_attention.forward(*inputs, 0, pooled, 0.25, True, 0)
    additive_attention.backward(result, weights, scores, *inputs, weights, kept, 0, pooled, 0.25, True, 0, *[True] * 6)
    assert guards.intact()


@interpreted
@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone(wanted):
    """What isn't wanted isn't computed; the gradient of the result, weights or scores may be all there is."""
    from mmkernels.triton import additive_attention

    image, _, w_image, _, v, bias_gate, w_gate, _ = additive((2, 20, 6), 4, 2)
    inputs = image, draw(2, 4), w_image, v, w_gate, bias_gate, None, None, None
    result, weights, scores, kept = additive_attention.forward(*inputs, 0, True, 0.0, True, 0)
    rest = *inputs, weights, kept, 0, True, 0.0, True, 0
    for up in ((result, None, None), (None, weights, None), (None, None, scores)):
        together = additive_attention.backward(*up, *rest, *[True] * 6)
        alone = additive_attention.backward(*up, *rest, *[i == wanted for i in range(6)])
        assert torch.equal(alone[wanted], together[wanted]) and all(
            g.numel() == 0 for i, g in enumerate(alone) if i != wanted
        )


@interpreted
@pytest.mark.parametrize("lies", ("expanded", "transposed", "window", "batch expanded"))
@pytest.mark.parametrize("operation", (CHANNEL, *ADDITIVE_OPTIONS))
def test_gradients_that_lie_anyhow(operation, lies, monkeypatch):
    """As sum() sends them back, for one."""
    panels_of(monkeypatch, 20 * 18)
    shape, offsets, options = ((3, 37, 11), None, {}) if operation == CHANNEL else ADDITIVE_OPTIONS[operation]
    tensors = (
        channel(shape)
        if operation == CHANNEL
        else additive(shape, 9, 1 if options else 3, offsets and len(offsets) - 1)
    )
    options = {**options, **({"offsets": torch.tensor(offsets)} if offsets else {}), "need_weights": True}
    change = {
        "expanded": lambda g: g.flatten()[:1].view([1] * g.dim()).expand(g.shape),
        "transposed": lambda g: g.mT.contiguous().mT,
        "window": lambda g: torch.nn.functional.pad(g, (1, 1, 2, 2), value=77.0)[..., 2:-2, 1:-1],
        "batch expanded": lambda g: g[:1].expand(g.shape),
    }[lies]

    def compute(run, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = run(*leaves, **options) if operation == CHANNEL else run(**dict(zip(NAMES, leaves)), **options)
        return torch.autograd.grad(outputs, leaves, [change(draw(*o.shape, seed=4).to(o.dtype)) for o in outputs])

    assert_computes(compute, CHANNEL if operation == CHANNEL else ADDITIVE, "triton", tensors)


@interpreted
def test_same_bits_every_time(monkeypatch):
    panels_of(monkeypatch, 100 * 8)
    processors(monkeypatch, 8)
    for operation, tensors in ((CHANNEL, channel((3, 300, 8))), (ADDITIVE, additive((2, 700, 8), 4, 2))):
        run = function(operation, mmk, need_weights=True, backend="triton")
        first, second = (everything(run, tensors) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@interpreted
@pytest.mark.skipif(backends.extension is None, reason="the C++ operations aren't built")
@pytest.mark.parametrize("operation", (CHANNEL, ADDITIVE))
@pytest.mark.parametrize("suffix", ("", "_backward"))
def test_schema_is_that_of_the_other_backends(operation, suffix):
    getattr(mmk, operation)(
        *(channel((1, 1, 1)) if operation == CHANNEL else additive((1, 1, 1), 1)[:5]), backend="triton"
    )
    schema = lambda name: str(getattr(torch.ops.mmkernels, name + suffix).default._schema).replace(name, operation)
    assert schema(f"{operation}_triton") == schema(operation)


@pytest.mark.property(
    "opcheck", "opcheck backward", backend="triton", operation=["channel_attention", "additive_attention"]
)
@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed):
    mmk.channel_attention(*channel((1, 1, 1)), backend="triton")
    mmk.additive_attention(*additive((1, 1, 1), 1)[:5], backend="triton")
    operations = torch.ops.mmkernels
    leaf = lambda *shape: draw(*shape).requires_grad_()
    if not packed:
        inputs = leaf(2, 7, 6), leaf(2, 6), leaf(6, 6)
        torch.library.opcheck(operations.channel_attention_triton.default, (*inputs, True, 0))
        torch.library.opcheck(
            operations.channel_attention_triton_backward.default,
            (draw(2, 7, 6), draw(2, 7, 6), *inputs, draw(0, 6), True, 0, True, True, True),
        )
    inputs = (
        leaf(*(13,) if packed else (2, 7), 6),
        leaf(2, 4),
        leaf(4, 6),
        leaf(2, 4),
        leaf(4, 6),
        leaf(4),
        None,
        torch.tensor([0, 5, 13]) if packed else None,
        torch.tensor(3) if packed else None,
    )
    options = 2, True, 0.25 if packed else 0.0, True, 0
    torch.library.opcheck(operations.additive_attention_triton.default, (*inputs, *options))
    if not packed:  # the second derivatives look at the offsets
        produced = operations.additive_attention_triton(*inputs, *options)
        result, weights, scores, kept = (t.detach() for t in produced)
        torch.library.opcheck(
            operations.additive_attention_triton_backward.default,
            (result, weights, scores, *inputs, weights, kept, *options, *[True] * 6),
        )


@pytest.mark.property("mistakes of a kernel's caller", backend="triton", operation=["additive_attention"])
@interpreted
@pytest.mark.parametrize(
    "place, value",
    (
        (0, torch.zeros(2, 7)),
        (0, torch.zeros(2, 7, 6).double()),
        (1, torch.zeros(2, 5)),
        (2, torch.zeros(4, 5)),
        (3, torch.zeros(2, 5)),
        (4, None),
        (5, torch.zeros(5)),
        (6, torch.ones(2, 8) > 0),
        (7, torch.tensor([0, 7])),
        (8, torch.tensor(3)),
        (11, -0.5),
        (11, 0.5),
        (13, 5),
    ),
)
def test_operation_refuses_what_would_not_be_safe(place, value):
    mmk.additive_attention(*additive((1, 1, 1), 1)[:5], backend="triton")
    arguments = [
        draw(2, 7, 6),
        draw(2, 4),
        draw(4, 6),
        draw(2, 4),
        draw(4, 6),
        draw(4),
        None,
        None,
        None,
        0,
        True,
        0.0,
        False,
        0,
    ]
    torch.ops.mmkernels.additive_attention_triton(*arguments)
    arguments[place] = value
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.mmkernels.additive_attention_triton(*arguments)


@interpreted
@pytest.mark.property("mistakes of a kernel's caller", backend="triton", operation=["channel_attention"])
@pytest.mark.parametrize(
    "place, value", ((1, torch.zeros(2, 5)), (2, torch.zeros(5, 6)), (2, torch.zeros(6, 6).double()), (4, 5))
)
def test_channel_refuses_what_would_not_be_safe(place, value):
    arguments = [draw(2, 7, 6), draw(2, 6), draw(6, 6), True, 0]
    mmk.channel_attention(draw(2, 7, 6), draw(2, 5), draw(6, 11), backend="triton")
    torch.ops.mmkernels.channel_attention_triton(*arguments)
    arguments[place] = value
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.mmkernels.channel_attention_triton(*arguments)
