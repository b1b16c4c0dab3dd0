"""The reference, which is the truth everywhere else, against NumPy in float64, written from the formulas alone."""

import inspect

import pytest
import torch
from support import numpy_reference
from support.attention_tests import assert_rule

import mmkernels
from mmkernels import cases, functional, peers, reference, tolerance


def to_numpy(arguments):
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize(
    "operation, case",
    [
        pytest.param(operation, case, id=f"{operation} {case}")
        for operation in functional.__all__
        for case in cases.selected(operation, small=True)
    ],
)
def test_definition(operation, case):
    arguments = case.build(torch.float64)
    function = getattr(reference, operation)
    everything = {name: True for name in inspect.signature(function).parameters if name.startswith("need_")}
    torch.manual_seed(0)  # which dropout takes
    found = function(**arguments | everything)
    found = [result for result in (found if isinstance(found, tuple) else (found,)) if result is not None]
    torch.manual_seed(0)
    truth = [torch.from_numpy(t) for t in getattr(numpy_reference, operation)(**to_numpy(arguments))]
    assert_rule(found, truth, peer=truth, batch=len(truth[0]))  # no more than another order of sums in float64


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_spatial_attention_runs_in_float32(dtype):
    """The result of a narrow dtype is the float32 result, rounded once."""
    image = torch.randn(2, 30, 16).to(dtype)
    text = torch.randn(2, 16).to(dtype)
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
    "one NaN": lambda result, weights: (
        result + torch.tensor([float("nan")] + [0.0] * (result.shape[-1] - 1)).to(result),
        weights,
    ),
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


@pytest.mark.parametrize("operation", functional.__all__)
def test_tolerance_leaves_the_arguments_as_they_are(operation):
    """All backends of a case get the very same tensors."""
    for case in cases.selected(operation, small=True)[::9]:
        standard = tolerance.Standard(operation, case, torch.float32)
        standard.test(getattr(reference, operation))
        for name, value in case.build(torch.float32).items():
            kept = standard.arguments[name]
            assert not isinstance(value, torch.Tensor) or torch.equal(kept, value) and not kept.requires_grad, name


@pytest.mark.parametrize("masked", [("text_mask",), ("image_mask",), ("text_mask", "image_mask")], ids=str)
def test_tolerance_wants_exact_zeros_where_no_side_attends(masked):
    """Where the text alone is masked the image gets 0, but the text attends to it: gradients may cancel, and be
    rounded."""

    def make(draw):
        return {name: draw.normal(1, 1, 5, 4) for name in ("image_query", "text_key", "image_value", "text_value")} | {
            name: torch.zeros(1, 5, dtype=torch.bool) for name in masked
        }

    standard = tolerance.Standard("bidirectional_attention", cases.Case("masked", "any", make, True), torch.float32)
    assert (standard.magnitudes == [0.0]) == (len(masked) == 2)


@pytest.mark.parametrize("error, passed", [(1e-6, True), (1e-4, False)])
def test_tolerance_measures_what_cancels_by_its_terms(error, passed):
    """Of equal positions the text's gradient is 0: a sum of terms that are as large as the results."""

    def make(draw):
        return {
            "image": draw.normal(1, 1, 4).expand(1, 30, 4),
            "text": draw.normal(1, 4),
            "combine": "pool",
            "rescale": True,
        }

    standard = tolerance.Standard("spatial_attention", cases.Case("equal positions", "any", make, True), torch.float32)
    found = {name: tensor.float() for name, tensor in standard.truth.items()}
    found["text.grad"] = found["text.grad"] + error * float(standard.truth["result"].abs().max())
    assert all(verdict.passed for verdict in standard.judge(found)) == passed


# What belongs to no case: a tensor of three samples, the last a thousand times smaller.

TENSOR = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TENSOR[2] /= 1000


def compared(spoil, samples=True):
    found = TENSOR.float()
    return tolerance.compare("tensor", spoil(found), found.double(), peer=found, samples=samples)


def spoiled_at(where, factor):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor[where] *= factor
        return tensor

    return spoil


LARGEST = divmod(int(TENSOR.abs().argmax()), 50)


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled_at((), 1.0001),
        spoiled_at(LARGEST, 1.0001),
        spoiled_at(LARGEST, float("nan")),
        spoiled_at(LARGEST, float("inf")),
        lambda tensor: tensor.roll(1, 1),
        lambda tensor: tensor[:, :-1],
        torch.Tensor.double,
        torch.zeros_like,
    ],
    ids=["all", "one element", "NaN", "Inf", "moved", "shape", "dtype", "zeros"],
)
@pytest.mark.parametrize("samples", [True, False])
def test_compare_catches(spoil, samples):
    assert compared(torch.clone, samples).passed
    assert not compared(spoil, samples).passed


def test_compare_judges_samples_on_their_own():
    small = spoiled_at(2, 1.0001)
    assert compared(small, samples=False).passed and not compared(small, samples=True).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("other", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_compare_tells_what_is_not_finite(value, other):
    """NaN isn't Inf, nor is either a number."""
    truth, found = (torch.tensor([1.0, first]) for first in (value, other))
    verdict = tolerance.compare("tensor", found, truth.double(), peer=truth)
    assert verdict.passed == torch.equal(truth.nan_to_num(2), found.nan_to_num(2))
