"""Packed bags in plain PyTorch never look at the offsets' values: results and two derivatives can be traced, and are
those of one bag after another."""

import pytest
import torch
from support.attention_tests import draw
from torch.fx.experimental.proxy_tensor import make_fx

from mmkernels import reference

BAGS = (0, 4, 0, 7, 1, 0)
OFFSETS = torch.tensor([0, *torch.tensor(BAGS).cumsum(0).tolist()])
ROWS, CHANNELS = sum(BAGS), 6
LAYERS = [draw(*shape, seed=9 + i).double() for i, shape in enumerate(((5, CHANNELS), (5, CHANNELS), (1, 5)))]


def spatial(image, text, mask, offsets, combine):
    return reference.spatial_attention(
        image, text, mask=mask, offsets=offsets, num_heads=2, combine=combine, need_weights=True
    )


def additive(image, query, mask, offsets, combine):
    return reference.additive_attention(
        image, query, *LAYERS, mask=mask, offsets=offsets, combine=combine, need_weights=True
    )


def one_after_another(function):
    """The definition: each bag as a sample of its own."""

    def run(image, vector, mask, offsets, combine):
        bounds = offsets.tolist()
        results = [
            function(image[None, a:b], vector[i : i + 1], None if mask is None else mask[None, a:b], None, combine)
            for i, (a, b) in enumerate(zip(bounds, bounds[1:]))
        ]
        return torch.cat([r if combine == "pool" else r[0] for r, _ in results]), torch.cat(
            [w[0] for _, w in results], -1
        )

    return run


def derivatives(function, mask, offsets, combine):
    """image, vector -> the results, their gradients, and those gradients' gradients."""

    def run(image, vector):
        loss = lambda i, v: sum((r.sin() * (1 + k)).sum() for k, r in enumerate(function(i, v, mask, offsets, combine)))
        first = torch.func.grad(loss, (0, 1))
        second = torch.func.grad(lambda i, v: sum(g.cos().sum() for g in first(i, v)), (0, 1))
        return *function(image, vector, mask, offsets, combine), *first(image, vector), *second(image, vector)

    return run


@pytest.mark.parametrize("function", [spatial, additive])
@pytest.mark.parametrize("combine", ["pool", "multiply"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("traced", ["eager", "make_fx", "compile"])
def test_two_derivatives(function, combine, masked, traced):
    image = draw(ROWS, CHANNELS).double()
    vector = draw(len(BAGS), CHANNELS, seed=1).double()
    mask = torch.arange(ROWS) % 3 > 0 if masked else None  # the last bag is masked completely
    run = derivatives(function, mask, OFFSETS, combine)
    expected = derivatives(one_after_another(function), mask, OFFSETS, combine)(image, vector)
    if traced == "make_fx":
        run = make_fx(run)(image, vector)
    elif traced == "compile":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(run(image, vector), expected):
        assert actual.shape == wanted.shape and bool(actual.isfinite().all())
        assert (actual - wanted).abs().max() <= 1e4 * torch.finfo(torch.float64).eps * (
            1 + wanted.abs().max()
        )  # sums in another order


@pytest.mark.parametrize("function", [spatial, additive])
def test_another_graph_of_bags_needs_no_other_trace(function):
    """The offsets are an input of the graph, not constants in it."""
    image = draw(ROWS, CHANNELS).double()
    vector = draw(len(BAGS), CHANNELS, seed=1).double()
    graph = make_fx(lambda offsets: function(image, vector, None, offsets, "pool")[0])(OFFSETS)
    other = torch.tensor([0, 2, 3, 3, 9, 12, 12])
    assert torch.equal(graph(other), function(image, vector, None, other, "pool")[0])
