"""When is a result right? One rule, for every backend, dtype, operation, result and gradient.

The truth is the reference in float64 on the same, already rounded, inputs. Each sample (each bag) is judged on its own,
so that a large one can't hide a small one: its error is the largest absolute difference over the sample's largest
magnitude, and likewise the root mean square of the difference over that of the truth. The worst sample counts.

Allowed is twice the error that the plain PyTorch peer makes in the same dtype (flash-attention's rule), plus a floor:
one epsilon of the result's dtype, since a small case may round exactly by luck in the peer, and 32 epsilons of the
dtype in which sums run, since the order of a sum is free (128 in float64). In float64 the truth has errors, too, and
the peer has the very same: what the peer makes in float32, times the ratio of the epsilons, stands for it there.
However bad the peer is, a quarter of the magnitude is too much.

Where a sum cancels, so that a result is a thousandth of its terms, no order of summing keeps digits that the inputs
don't have, and the peer may be exact by luck: what half an epsilon in every input changes of the truth (eight times
that) is allowed, too. That is backward stability, as in Higham, Accuracy and Stability of Numerical Algorithms, section
1.5; for a result that doesn't cancel it adds nothing to the floor.

What is exact is compared exactly: a sample where nothing takes part is 0 everywhere, gradients included; a shape, a
dtype, and the places of NaN and Inf are the truth's.
"""

import functools
import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import cases, peers, reference

PEER = 2
RESULT_EPS = 1
ROUNDED = 8
SUM_EPS = {torch.float32: 32, torch.float64: 128}
CEILING = 0.25
CANCELLED = 1e-12
OF_POSITIONS = ("weights", "scores")  # outputs with a number a position, last


@dataclass(frozen=True)
class Verdict:
    """How one tensor compares: `ratio` above 1, or a `problem`, is a failure."""

    tensor: str
    error: float
    allowed: float
    problem: str = ""

    @property
    def ratio(self):
        return float("inf") if self.problem else self.error / self.allowed

    @property
    def passed(self):
        return self.ratio <= 1  # False for NaN, too

    def __str__(self):
        return f"{self.tensor}: " + (self.problem or f"error {self.error:.2e}, allowed {self.allowed:.2e}")


def evaluate(
    function, arguments, *, dtype=None, gradients=True, upstream=None, names=("result", "weights", "scores"), **options
):
    """Runs an operation: ``{"result": ..., "weights": ..., "image.grad": ..., ...}``, the outputs under their `names`.

    Every floating-point argument is taken as it lies in memory, in `dtype` if given, and gets a gradient, or those do
    that `gradients` names; `upstream(i, tensor)` gives the gradient that flows into output i (default:
    :func:`upstream_like`).
    """
    arguments = {
        name: _leaf(value, dtype, gradients if isinstance(gradients, bool) else name in gradients)
        for name, value in arguments.items()
    }
    with torch.set_grad_enabled(bool(gradients)), _same_numbers(arguments.get("dropout_p")):
        outputs = function(**arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {name: output.detach() for name, output in zip(names, outputs) if output is not None}
    if gradients:
        upstream = upstream or upstream_like
        leaves = {
            name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.requires_grad
        }
        ends = [(o, upstream(i, o)) for i, o in enumerate(outputs) if o is not None and o.requires_grad]
        grads = (
            torch.autograd.grad(
                [o for o, _ in ends],
                list(leaves.values()),
                [g for _, g in ends],
                allow_unused=True,
                materialize_grads=True,
            )
            if ends
            else [torch.zeros_like(leaf) for leaf in leaves.values()]
        )
        found |= {f"{name}.grad": grad for name, grad in zip(leaves, grads)}
    return found


def upstream_like(i, output):
    """Random gradients for output i, the same for truth, peer and backend: rounded to the coarsest dtype there is."""
    generator = torch.Generator().manual_seed(7 + i)
    return torch.randn(output.shape, generator=generator).to(torch.bfloat16).to(output.device, output.dtype)


class Standard:
    """What a case has to give: its arguments, the truth, and how far off the peer is. Serves every backend. `gradients`
    as :func:`evaluate` takes them."""

    def __init__(self, operation, case, dtype, device="cpu", seed=0, gradients=True):
        self.run = getattr(reference, operation)
        peer = getattr(peers, operation)
        # With the defaults: what a sample is depends on them, and operations have different ones.
        defaults = {
            name: p.default for name, p in inspect.signature(self.run).parameters.items() if p.default is not p.empty
        }
        self.arguments = defaults | case.build(dtype, device, seed)
        self.gradients = gradients
        self.names = cases.outputs(operation)
        self.parameters = cases.parameters(operation)
        run = self.run
        with _threads(1 if case.small else torch.get_num_threads()):  # waking the others costs more than it gives
            self.truth = evaluate(run, self.arguments, dtype=torch.float64, gradients=gradients, names=self.names)
            self.peer = evaluate(peer, self.arguments, gradients=gradients, names=self.names)
            self.narrow = (
                evaluate(peer, self.arguments, dtype=torch.float32, gradients=gradients, names=self.names)
                if dtype == torch.float64
                else None
            )
            outputs = evaluate(run, self.arguments, gradients=False, names=self.names)
        self.dtypes = {
            name: outputs[name].dtype if name in outputs else self.arguments[name.removesuffix(".grad")].dtype
            for name in self.truth
        }
        results = [name for name in self.names if name in self.truth and name not in OF_POSITIONS]
        # A sample's magnitude, at least that of its inputs; 0 where nothing takes part.
        self.magnitudes = [
            max(1.0, *(_magnitude(part) for part in parts)) if any(part.any() for part in parts) else 0.0
            for parts in zip(*(_samples("result", self.truth[name], self.arguments) for name in results))
        ]

    @functools.cached_property
    def rounded(self):
        """The truth where every input is half an epsilon (of the dtype that sums run in) more or less. Few tensors ask
        for it."""
        arguments = {name: half_an_epsilon_off(value) for name, value in self.arguments.items()}
        return evaluate(self.run, arguments, dtype=torch.float64, gradients=self.gradients, names=self.names)

    def judge(self, actual):
        """Verdicts on what :func:`evaluate` returned for a backend, one a tensor."""
        return [_judge(self, name, actual[name], self.truth[name]) for name in self.truth]

    def test(self, function, **options):
        """Runs a backend's function on the case and judges it."""
        return self.judge(evaluate(function, self.arguments, gradients=self.gradients, names=self.names, **options))


def _judge(standard, name, actual, truth):
    dtype = standard.dtypes[name]
    problem = _problem(actual, truth, dtype)
    if problem:
        return Verdict(name, 0, 0, problem)
    errors, of_peer = (_errors(standard, name, t, truth, dtype) for t in (actual, standard.peer[name]))
    of_narrow = None if standard.narrow is None else _errors(standard, name, standard.narrow[name], truth, dtype)
    verdict = _verdict(name, dtype, errors, of_peer, of_narrow)
    return (
        verdict
        if verdict.passed
        else _verdict(
            name, dtype, errors, of_peer, of_narrow, _errors(standard, name, standard.rounded[name], truth, dtype)
        )
    )


def half_an_epsilon_off(value, seed=0):
    """In float64, up or down by chance, the same for the same shape; what isn't floating point stays."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator().manual_seed(value.numel() + seed)
    up = torch.rand(value.shape, generator=generator) < 0.5
    half = torch.finfo(value.dtype if value.dtype == torch.float64 else torch.float32).eps / 2
    return value.double() * (1 + half * (2 * up.to(value.device, torch.float64) - 1))


def compare(name, actual, truth, peer, narrow=None, samples=False, rounded=None):
    """The verdict on one tensor that belongs to no case.

    `truth` is float64, `peer` what plain PyTorch gives in actual's precision, `narrow` what it gives in float32 where
    actual is float64, `rounded` the truth of inputs that are :func:`half_an_epsilon_off`. With `samples` every entry
    along dimension 0 is judged on its own, else the tensor as a whole.
    """
    problem = _problem(actual, truth, peer.dtype)
    if problem:
        return Verdict(name, 0, 0, problem)

    def errors(found):
        if found is None:
            return None
        pairs = zip(found.double(), truth) if samples else [(found.double(), truth)]
        return _largest_and_rms([(part, true, 1.0) for part, true in pairs], actual.dtype)

    limits = errors(peer), errors(narrow), *([] if rounded is None else [errors(rounded)])
    return _verdict(name, actual.dtype, errors(actual), *limits)


def _problem(actual, truth, dtype):
    """What can't be a matter of rounding: shape, dtype, the places of NaN, Inf and -Inf; "" where they are right."""
    if actual.shape != truth.shape:
        return f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    if actual.dtype != dtype:
        return f"dtype {actual.dtype}, expected {dtype}"
    for name, which in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        wrong = int((which(actual) != which(truth)).sum())
        if wrong:
            return f"{wrong} elements are {name} where the truth isn't, or the other way round"
    return ""


def _verdict(name, dtype, errors, of_peer, of_narrow, of_rounded=(0, 0)):
    """The rule. All are (largest, root mean square) errors; `of_narrow` the peer's in float32 where `dtype` is float64,
    `of_rounded` the truth's where the inputs are half an epsilon off."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    floor = RESULT_EPS * torch.finfo(dtype).eps + SUM_EPS[sums] * torch.finfo(sums).eps
    if of_narrow is not None:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        of_peer = [max(e, ratio * n) for e, n in zip(of_peer, of_narrow)]
    limits = [
        min(PEER * e + floor + ROUNDED * r, CEILING) if e == e else CEILING for e, r in zip(of_peer, of_rounded)
    ]  # a peer that overflowed sets no limit
    error, allowed = max(zip(errors, limits), key=lambda pair: pair[0] / pair[1])
    return Verdict(name, error, allowed)


def _errors(standard, name, actual, truth, dtype):
    """(largest, root mean square) error, relative to the sample's magnitude, of the worst sample."""
    if name.removesuffix(".grad") in standard.parameters:  # all samples share it: judged whole
        samples = [(actual.double(), truth, max(standard.magnitudes, default=0.0))]
    else:
        parts = (_samples(name, tensor, standard.arguments) for tensor in (actual.double(), truth))
        samples = zip(*parts, standard.magnitudes)
    return _largest_and_rms(samples, dtype)


def _largest_and_rms(samples, dtype):
    """Of (actual, truth, magnitude of the sample's results, 0 where nothing takes part) a sample."""
    largest = square = 0.0
    quiet = max(torch.finfo(dtype).tiny, 1e-30)  # below, a dtype's own steps are coarser than its epsilon
    for part, true, magnitude in samples:
        if true.numel() == 0:
            continue
        finite = true.isfinite()
        true, difference = true.where(finite, 0), (part - true).where(finite, 0).abs()
        # A gradient that cancels to 0 (a softmax over equal positions) has none: its terms are of the results'
        # magnitude.
        unit = quiet if true.abs().max() > CANCELLED else max(magnitude, quiet)
        largest = max(largest, float(difference.max() / (true.abs().max() + unit)))
        square = max(square, float(difference.square().mean().sqrt() / (true.square().mean().sqrt() + unit)))
        if float(difference.sum()) != float(difference.sum()):  # NaN: max() would forget it
            return float("nan"), float("nan")
    return largest, square


def _magnitude(tensor):
    return float(tensor.abs().nan_to_num(0, 0, 0).max()) if tensor.numel() else 0.0


def _samples(name, tensor, arguments):
    """The parts of a tensor that belong to one sample each; a tensor without samples is cut along its first
    dimension."""
    offsets = arguments.get("offsets")
    if offsets is None:
        return tensor.unbind(0)
    sizes = offsets.diff().tolist()
    if name in OF_POSITIONS:
        return tensor.split(sizes, -1)
    if name == "image.grad" or (name == "result" and arguments["combine"] != "pool"):
        return tensor.split(sizes, 0)
    return tensor.unbind(0)


@contextmanager
def _same_numbers(dropout_p):
    """Dropout draws the same seed in every run."""
    if not dropout_p:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def _threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leaf(value, dtype, requires_grad):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    value = value.detach() if dtype in (None, value.dtype) else value.detach().to(dtype)
    return value.requires_grad_() if requires_grad else value
