"""The reference, which is the truth everywhere else, against NumPy in float64, written from the formulas alone."""

import inspect

import numpy as np
import pytest
import torch

import mmkernels
from mmkernels import cases, functional, peers, reference, tolerance


def numpy_spatial_attention(image, text, mask=None, offsets=None, scale=None, num_heads=1, combine="multiply",
                            rescale=False, layout="bnd", need_weights=False):
    """Position by position: w_n = exp(s_n) / sum_m exp(s_m) over the positions that take part, per head."""
    if offsets is not None:
        bags = [(slice(start, stop), b) for b, (start, stop) in enumerate(zip(offsets, offsets[1:]))]
        result = np.zeros(text.shape if combine == "pool" else image.shape)
        weights = np.zeros((num_heads, len(image)))
        for rows, b in bags:
            r, w = numpy_spatial_attention(image[None, rows], text[b:b + 1], None if mask is None else mask[None, rows],
                                           None, scale, num_heads, combine, rescale)
            result[b if combine == "pool" else rows] = r[0]
            weights[:, rows] = w[0]
        return result, weights
    if layout == "bdhw":
        batch, channels, height, width = image.shape
        rows = np.moveaxis(image, 1, -1).reshape(batch, height * width, channels)
        result, weights = numpy_spatial_attention(rows, text, None if mask is None else mask.reshape(batch, -1), None,
                                                  scale, num_heads, combine, rescale)
        if combine == "multiply":
            result = np.moveaxis(result.reshape(batch, height, width, channels), -1, 1)
        return result, weights

    batch, positions, channels = image.shape
    width = channels // num_heads
    scale = 1 / np.sqrt(channels / num_heads) if scale is None else scale
    result = np.zeros((batch, channels) if combine == "pool" else image.shape)
    weights = np.zeros((batch, num_heads, positions))
    for b in range(batch):
        part = [n for n in range(positions) if mask is None or mask[b, n]]
        if not part:
            continue
        for h in range(num_heads):
            own = slice(h * width, (h + 1) * width)
            scores = np.array([scale * np.dot(image[b, n, own], text[b, own]) for n in part])
            powers = np.exp(scores - scores.max())
            w = powers / powers.sum() * (len(part) if rescale else 1)
            weights[b, h, part] = w
            for n, w_n in zip(part, w):
                if combine == "pool":
                    result[b, own] += w_n * image[b, n, own]
                else:
                    result[b, n, own] = w_n * image[b, n, own]
    return result, weights


def to_numpy(arguments):
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("case", cases.selected("spatial_attention", small=True), ids=str)
def test_spatial_attention(case):
    arguments = case.build(torch.float64)
    result, weights = reference.spatial_attention(**arguments | {"need_weights": True})
    for actual, expected in zip((result, weights), numpy_spatial_attention(**to_numpy(arguments))):
        assert tuple(actual.shape) == expected.shape
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_spatial_attention_runs_in_float32(dtype):
    """The result of a narrow dtype is the float32 result, rounded once."""
    image, text = torch.randn(2, 30, 16).to(dtype), torch.randn(2, 16).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result, weights = reference.spatial_attention(image, text, need_weights=True)
    expected, expected_weights = reference.spatial_attention(image.to(wide), text.to(wide), need_weights=True)
    assert result.dtype == dtype and weights.dtype == wide
    assert torch.equal(result, expected.to(dtype)) and torch.equal(weights, expected_weights)


@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("layout", ["bnd", "bdhw", "packed"])
def test_spatial_attention_gradients(layout, combine):
    """The gradients that every backend is compared with, against differences of the function's values."""
    generator = torch.Generator().manual_seed(0)
    shape = {"bnd": (2, 7, 6), "bdhw": (2, 6, 2, 3), "packed": (9, 6)}[layout]
    image = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    options = {"offsets": torch.tensor([0, 3, 9])} if layout == "packed" else {"layout": layout}
    run = lambda i, t: reference.spatial_attention(i, t, num_heads=2, combine=combine, need_weights=True, **options)
    assert torch.autograd.gradcheck(run, (image, text))


@pytest.mark.parametrize("operation", functional.__all__)
def test_every_operation_is_covered(operation):
    """A reference, a peer and cases for every public function, with the same arguments."""
    public = inspect.signature(getattr(functional, operation)).parameters
    expected = [name for name in public if name not in ("backend", "out")]
    for where in (reference, peers):
        assert list(inspect.signature(getattr(where, operation)).parameters) == expected, where.__name__
    found = cases.selected(operation)
    assert len({case.name for case in found}) == len(found) > 20
    assert 20 < len(cases.selected(operation, small=True)) < len(found)
    assert operation in mmkernels.__all__


def test_case_seeds():
    case = cases.selected("spatial_attention", small=True)[0]
    images = [case.build(torch.float32, seed=seed)["image"] for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


# The tolerance rule is code that can be wrong: it has to let right results pass and to catch small mistakes.

CASES = {case.name: case for case in cases.selected("spatial_attention")}


def spoiled(spoil):
    """The reference with a mistake: `spoil(result, weights)` changes what it returns."""
    def run(*args, **kwargs):
        result, weights = reference.spatial_attention(*args, **kwargs | {"need_weights": True})
        result, weights = spoil(result, weights)
        return (result, weights) if kwargs.get("need_weights") else result
    return run


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sizes: 5x799x3 multiply", "large: bag of 20011 multiply", "masks: random pool"])
def test_tolerance_lets_the_reference_pass(name, dtype):
    verdicts = tolerance.Standard("spatial_attention", CASES[name], dtype).test(reference.spatial_attention)
    assert all(verdict.passed for verdict in verdicts), list(map(str, verdicts))


MISTAKES = {
    "2 % off": lambda result, weights: (result * 1.02, weights),
    "weights 2 % off": lambda result, weights: (result, weights * 1.02),
    "last row forgotten": lambda result, weights: (torch.cat([result[:, :-1], result[:, -1:] * 0], 1), weights),
    "first row twice": lambda result, weights: (torch.cat([result[:, :1], result[:, :-1]], 1), weights),
    "one NaN": lambda result, weights: (result + torch.tensor([float("nan")] + [0.0] * (result.shape[-1] - 1)).to(result), weights),
    "another shape": lambda result, weights: (result[:, :-1], weights),
    "another dtype": lambda result, weights: (result, weights.half()),
    "gradient forgotten": lambda result, weights: (result.detach() + 0 * result.sum(), weights),
}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_tolerance_catches(mistake, dtype):
    case = CASES["masks: random multiply"]
    verdicts = tolerance.Standard("spatial_attention", case, dtype).test(spoiled(MISTAKES[mistake]))
    assert not all(verdict.passed for verdict in verdicts), list(map(str, verdicts))


def test_tolerance_catches_two_hundred_thousandths_in_float32():
    case = CASES["large: bag of 20011 multiply"]
    standard = tolerance.Standard("spatial_attention", case, torch.float32)
    verdicts = standard.test(spoiled(lambda result, weights: (result * 1.00002, weights)))
    assert not all(verdict.passed for verdict in verdicts), list(map(str, verdicts))


def test_tolerance_judges_each_bag_on_its_own():
    """The weights of a small bag are 20,000 times those of the large one, and must not hide its errors."""
    case = CASES["large: bags of 1, 20011, 0, 700 multiply"]
    standard = tolerance.Standard("spatial_attention", case, torch.bfloat16)
    spoil = lambda result, weights: (torch.cat([result[:5000], result[5000:6000] * 0, result[6000:]]), weights)
    assert not all(verdict.passed for verdict in standard.test(spoiled(spoil)))


def test_tolerance_wants_exact_zeros():
    case = CASES["masks: whole sample multiply"]
    standard = tolerance.Standard("spatial_attention", case, torch.float32)
    spoil = lambda result, weights: (result + torch.tensor([1e-20, 0, 0, 0])[:, None, None], weights)
    assert not all(verdict.passed for verdict in standard.test(spoiled(spoil)))
