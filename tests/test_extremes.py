"""Softmax at the ends of the floats' range: masks of the lowest and largest numbers, scores that are infinite or NaN.
(Scores near the largest float are cases of mmkernels.cases.)"""

import pytest
import torch
from support.attention_tests import outputs
from support.runnable import runnable

import mmkernels as mmk
from mmkernels import cases, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
on_every_backend_and_dtype = pytest.mark.parametrize(
    "backend, device, dtype", runnable("gated_cross_attention", DTYPES)
)


def attend(mask, backend, device, dtype, values=(2.0, 4.0)):
    """(result, gradient of value, gradient of the mask) of one query whose scores are all 0, before the mask."""
    query = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
    key = torch.zeros(1, 1, len(values), 1, dtype=dtype, device=device)
    value = torch.tensor(values, dtype=dtype, device=device).view(1, 1, -1, 1).requires_grad_()
    mask = torch.tensor(mask, dtype=dtype, device=device).view(1, 1, 1, -1).requires_grad_()
    result = mmk.gated_cross_attention(query, key, value, attn_mask=mask, backend=backend)
    return result.item(), *(grad.flatten().tolist() for grad in torch.autograd.grad(result.sum(), (value, mask)))


@on_every_backend_and_dtype
@pytest.mark.parametrize("share", [1, 0.75, 1e-3, 1e-10, 1e-30])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_same_for_all_changes_nothing(sign, share, backend, device, dtype):
    """What is kept for backward must tell two tokens from one beside a number of any size, too."""
    same = sign * share * torch.finfo(dtype).max
    assert attend([same] * 2, backend, device, dtype) == (3.0, [0.5, 0.5], [-0.5, 0.5])


@on_every_backend_and_dtype
def test_one_above_all(backend, device, dtype):
    largest = torch.finfo(dtype).max
    for mask in ([largest, 0.0], [largest, -largest], [0.0, -largest], [0.0, float("-inf")], [-largest, float("-inf")]):
        assert attend(mask, backend, device, dtype) == (2.0, [1.0, 0.0], [0.0, 0.0])


@on_every_backend_and_dtype
def test_nothing_but_minus_infinity(backend, device, dtype):
    assert attend([float("-inf")] * 2, backend, device, dtype) == (0.0, [0.0, 0.0], [0.0, 0.0])


# Scores that aren't finite: NaN and Inf come out where they do in plain PyTorch. (What they do to gradients, nobody
# relies on.)

SOME = {
    "spatial_attention": ("masks: random multiply", "masks: random pool", "packed: rescale"),
    "gated_cross_attention": ("masks: BT", "masks: BHNT, no gate", "masks: float -inf", "sizes: 1x1x3x113x17x7"),
    "bidirectional_attention": ("masks: both random", "sizes: 1x1x50x77x40x24"),
    "absorbed_attention": ("masks: both random", "results: both"),
    "deformable_attention": ("sizes: 2x3x7x5x4x5,6x3,3x1,1", "masks: random"),
    "channel_attention": ("options: small scores", "sizes: 1x3x113x7"),
    "additive_attention": (
        "masks: random pool",
        "masks: random multiply",
        "networks: relu query pool",
        "packed: strided mask",
    ),
}


@pytest.mark.property("NaN and Inf come out")
@pytest.mark.parametrize(
    "operation, case, backend, device, dtype",
    [
        pytest.param(
            operation,
            {case.name: case for case in cases.selected(operation)}[name],
            *p.values,
            id=f"{operation}-{p.id}-{name}",
        )
        for operation, names in SOME.items()
        for name in names
        for p in runnable(operation)
        if p.values[0] != "reference"
    ],
)
def test_scores_that_are_not_finite(operation, case, backend, device, dtype):
    arguments = case.build(dtype, device)
    for name, tensor in arguments.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        for value in (float("inf"), float("-inf"), float("nan")):
            poisoned = tensor.clone(memory_format=torch.contiguous_format)
            poisoned.view(-1)[tensor.numel() // 2 + 1] = value
            found, expected = (
                outputs(function(**arguments | {name: poisoned}, **options))
                for function, options in (
                    (getattr(mmk, operation), {"backend": backend}),
                    (getattr(reference, operation), {}),
                )
            )
            for f, e in zip(found, expected):
                assert torch.equal(f.isnan(), e.isnan()) and torch.equal(f.isinf(), e.isinf()), f"{value} in {name}"
