"""Channel and additive attention in Triton, interpreted: what they allocate, and where they write."""

import pytest
import torch
from support.triton_rows import (
    ADDITIVE_OPTIONS,
    CHANNEL,
    VIEWS,
    additive,
    assert_formula,
    panels_of,
    processors,
)
from support.triton_tests import Guards, draw, interpreted
from torch.utils._python_dispatch import TorchDispatchMode


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
        draw(2, 8),
        draw(hidden, 64),
        draw(hidden, 8),
        draw(1, hidden),
        draw(hidden),
        draw(hidden, 64, seed=1),
        draw(hidden),
        mask,
        None,
        None,
    )
    with Allocations(inputs) as mode:
        result, weights, scores, kept = additive_attention.forward(*inputs, 0, True, 0.0, True, 0)
        additive_attention.backward(
            result, weights, scores, *inputs, weights, kept, 0, True, 0.0, True, 0, False, *[True] * 7
        )
    assert mode.largest <= max(8 * 512, 40 * 64) * 4 < image.numel()
    inputs = image[..., :32], draw(2, 8), draw(32, 40), draw(32)
    up = draw(1).expand(2, 500, 32)
    with Allocations((*inputs, up)) as mode:
        channel_attention.backward(up, None, *inputs, None, False, 0, False, True, True, True)
    assert mode.largest <= 32 * 40 * 4


class AllGuards(Guards):
    """Every tensor that an operation allocates is placed, also what comes from `zeros` and `new_empty`."""

    def __init__(self, monkeypatch):
        super().__init__()
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
        inputs = draw(3, 37, 13), draw(3, 5), draw(13, 18), draw(13)
        up = draw(3, 37, 13, seed=4), draw(3, 37, 13, seed=5)
        module = channel_attention
        options = (True, 0)
        needs = 4
    else:
        shape, offsets, chosen = ADDITIVE_OPTIONS[operation]
        bags = 3 if offsets is None else 4
        inputs = (
            *additive(shape, 9, 1 if chosen else 3, bags),
            draw(*shape[:-1]) > 0,
            None if offsets is None else torch.tensor(offsets),
            torch.tensor(3) if chosen else None,
        )
        module = additive_attention
        options = (0, not chosen, 0.25 if chosen else 0.0, True, 0)
        needs = 8
    guards = AllGuards(monkeypatch)
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

    tensors = additive((41, 4), 3)
    tensors[1] = draw(len(bounds) - 1, 5)
    guards = AllGuards(monkeypatch)
    linear = torch.nn.functional.linear  # it gives what the kernels read for each bag
    place = lambda *operands: guards.place((found := linear(*operands)).shape, found.dtype).copy_(found)
    monkeypatch.setattr(torch.nn.functional, "linear", place)
    inputs = *tensors, None, torch.tensor(bounds), torch.tensor(3)
    result, weights, scores, kept = additive_attention.forward(*inputs, 0, pooled, 0.25, True, 0)
    additive_attention.backward(result, weights, scores, *inputs, weights, kept, 0, pooled, 0.25, True, 0, *[True] * 8)
    assert guards.intact()
