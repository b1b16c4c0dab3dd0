"""Channel and additive attention in Triton, interpreted: what the cases of all backends don't reach."""

import functools

import pytest
import torch
from support.attention_tests import assert_computes, assert_meets, standard_of
from support.triton_rows import (
    ADDITIVE,
    ADDITIVE_OPTIONS,
    CHANNEL,
    NAMES,
    VIEWS,
    additive,
    assert_formula,
    channel,
    panels_of,
    processors,
)
from support.triton_tests import draw, interpreted, on_every_dtype

import mmkernels as mmk
from mmkernels import backends


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


@interpreted
@on_every_dtype
@pytest.mark.parametrize("dropout_p", (0.0, 0.25))
@pytest.mark.parametrize("way", ADDITIVE_OPTIONS)
def test_additive_panels(way, dropout_p, dtype, monkeypatch):
    """Panels, masks and bags that don't end together; dropout counts rows on from panel to panel."""
    shape, offsets, options = ADDITIVE_OPTIONS[way]
    panels_of(monkeypatch, 20 * 18)
    tensors = additive(shape, 9, 1 if "combine" in options else 3, offsets and len(offsets) - 1, dtype)
    if offsets is None:
        tensors[0] = VIEWS["window"](tensors[0])
    else:
        options = {**options, "offsets": torch.tensor(offsets)}
    mask = draw(*shape[:-1], seed=8) > -0.3
    check(ADDITIVE, tensors, mask=mask, activation="gelu", dropout_p=dropout_p, **options)


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
        bias, scores = draw(4), draw(2, 9)
        bias[some], scores[0, some] = value, value
        mmk.channel_attention(*channel((1, 1, 1)), backend="triton")  # brings the operations
        tensors = image, torch.zeros(2, 3), torch.zeros(4, 7), bias
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
@pytest.mark.parametrize("wanted", range(8))
def test_one_gradient_alone(wanted):
    """What isn't wanted isn't computed; the gradient of the result, weights or scores may be all there is."""
    from mmkernels.triton import additive_attention

    inputs = *additive((2, 20, 6), 4, 2), None, None, None
    result, weights, scores, kept = additive_attention.forward(*inputs, 0, True, 0.0, True, 0)
    rest = *inputs, weights, kept, 0, True, 0.0, True, 0
    for up in ((result, None, None), (None, weights, None), (None, None, scores)):
        together = additive_attention.backward(*up, *rest, *[True] * 8)
        alone = additive_attention.backward(*up, *rest, *[i == wanted for i in range(8)])
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
        inputs = leaf(2, 7, 6), leaf(2, 3), leaf(6, 9), leaf(6)
        torch.library.opcheck(operations.channel_attention_triton.default, (*inputs, True, 0))
        torch.library.opcheck(
            operations.channel_attention_triton_backward.default,
            (draw(2, 7, 6), draw(2, 7, 6), *inputs, draw(0, 6), True, 0, True, True, True, True),
        )
    inputs = (
        leaf(*(13,) if packed else (2, 7), 6),
        leaf(2, 3),
        leaf(4, 6),
        leaf(4, 3),
        leaf(2, 4),
        leaf(4),
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
            (result, weights, scores, *inputs, weights, kept, *options, *[True] * 8),
        )


@pytest.mark.property("mistakes of a kernel's caller", backend="triton", operation=["additive_attention"])
@interpreted
@pytest.mark.parametrize(
    "place, value",
    (
        (0, torch.zeros(2, 7)),
        (0, torch.zeros(2, 7, 6).double()),
        (1, torch.zeros(2, 5)),
        (1, torch.zeros(3, 3)),
        (1, None),
        (2, torch.zeros(4, 5)),
        (3, torch.zeros(5, 3)),
        (3, torch.zeros(4, 3).double()),
        (3, None),
        (4, torch.zeros(2, 5)),
        (5, torch.zeros(5)),
        (6, None),
        (7, torch.zeros(5)),
        (8, torch.ones(2, 8) > 0),
        (9, torch.tensor([0, 7])),
        (10, torch.tensor(3)),
        (13, -0.5),
        (13, 0.5),
        (15, 5),
    ),
)
def test_operation_refuses_what_would_not_be_safe(place, value):
    mmk.additive_attention(*additive((1, 1, 1), 1)[:5], backend="triton")
    arguments = [
        draw(2, 7, 6),
        draw(2, 3),
        draw(4, 6),
        draw(4, 3),
        draw(2, 4),
        draw(4),
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
    "place, value",
    (
        (1, torch.zeros(2, 5)),
        (1, torch.zeros(3, 3)),
        (2, torch.zeros(5, 9)),
        (2, torch.zeros(6, 9).double()),
        (3, torch.zeros(5)),
        (5, 5),
    ),
)
def test_channel_refuses_what_would_not_be_safe(place, value):
    arguments = [draw(2, 7, 6), draw(2, 3), draw(6, 9), draw(6), True, 0]
    mmk.channel_attention(draw(2, 7, 6), draw(2, 5), draw(6, 11), backend="triton")
    torch.ops.mmkernels.channel_attention_triton(*arguments)
    arguments[place] = value
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.mmkernels.channel_attention_triton(*arguments)
