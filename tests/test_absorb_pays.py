"""absorb_pays tells which way takes fewer operations: beside PyTorch's own count of both, at any sizes."""

import pytest
import torch
from support.attention_tests import assert_rule, draw
from torch.utils.flop_counter import FlopCounterMode

import mmkernels as mmk

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis isn't installed: it draws these tests' arguments")
from hypothesis import strategies as st  # noqa: E402

sizes = st.integers(1, 40) | st.integers(1, 4096)


def heads(tensor, count):
    return tensor.unflatten(-1, (count, -1)).transpose(-2, -3)


def with_projections(image, key, value, weights):
    """Both results of one sample, None where one isn't wanted."""
    query_weight, pooled_weight, out_weight = weights
    scores = heads(image @ query_weight, len(key)) @ key.mT
    image_out = text_out = None
    if out_weight is not None:
        image_out = (scores.softmax(2) @ value).transpose(0, 1).flatten(1) @ out_weight
    if pooled_weight is not None:
        text_out = scores.softmax(1).mT @ heads(image @ pooled_weight, len(key))
    return image_out, text_out


def absorbed(image, key, value, weights):
    query_weight, pooled_weight, out_weight = weights
    image = image.expand(len(key), -1, -1)
    scores = image @ (key @ heads(query_weight, len(key)).mT).mT
    image_out = text_out = None
    if out_weight is not None:
        image_out = (scores.softmax(2) @ (value @ out_weight.unflatten(0, (len(key), -1)))).sum(0)
    if pooled_weight is not None:
        text_out = scores.softmax(1).mT @ image @ heads(pooled_weight, len(key))
    return image_out, text_out


def operands(draw, positions, tokens, image_dim, heads, width, out_dim, pool, attend):
    return (
        draw(positions, image_dim),
        draw(heads, tokens, width),
        draw(heads, tokens, width),
        (
            draw(image_dim, heads * width),
            draw(image_dim, heads * width) if pool else None,
            draw(heads * width, out_dim) if attend else None,
        ),
    )


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


on_meta = lambda *shape: torch.empty(shape, device="meta")
wanted = st.sampled_from([(True, True), (True, False), (False, True)])


def test_both_ways_are_the_same():
    given = operands(draw, 9, 4, 8, 3, 5, 7, True, True)
    wide = [t.double() for t in given[:3]] + [[w.double() for w in given[3]]]
    assert_rule(absorbed(*given), with_projections(*wide), with_projections(*given))


@hypothesis.given(sizes, sizes, sizes, st.integers(1, 16), st.integers(1, 128), st.none() | sizes, wanted)
def test_as_counted(positions, tokens, image_dim, heads, width, out_dim, wanted):
    """At a tie it doesn't pay; the more tokens, the less."""
    pool, attend = wanted
    pays = lambda tokens: mmk.absorb_pays(
        positions, tokens, image_dim, heads * width, heads, out_dim=out_dim, pool=pool, attend=attend
    )
    given = operands(on_meta, positions, tokens, image_dim, heads, width, out_dim or image_dim, pool, attend)
    assert pays(tokens) == (counted(absorbed, *given) < counted(with_projections, *given))
    assert pays(tokens) >= pays(tokens + 1)
    assert pays(tokens) >= pays(2 * tokens)
