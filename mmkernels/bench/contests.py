"""What competes, on which arguments: the one definition that ``mmkernels bench`` and ``pytest bench/`` share."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import functional, peers, tolerance
from ..cases import Case
from .timing import beyond_the_cache, captured, peak_memory, race

FEW_ROUNDS = {"rounds": 5, "budget": 0.8}
TRITON = "ours, triton"  # beside the CUDA kernels where there is a GPU; no peer
SINGLE = ("locations", "scores")  # in float32 beside features of 16 bits


@dataclass(frozen=True, eq=False)
class Contest:
    """Functions that do the same work on the same arguments, ours among them: one kind of row.

    Attributes:
        operation, kind: names; the kind ends with the unit of its times, ``", ms"`` or ``", us"``.
        inputs: ``(shape, device)`` -> the arguments by name.
        contestants: name -> function of the arguments that makes the contestant, itself a function of
            ``**arguments``. "ours" is one of them, the others are peers.
        beside: name -> function of the arguments that makes a call without any; no peers: what memory and library can
            do, or ours in another way.
        wanted: names of the arguments whose gradients are computed; none is inference.
        columns: ``(shape, arguments, times)`` -> what else a right row tells.
        checked: arguments -> all the arguments on which ours is compared with float64 before a time counts.
        shapes: shapes of its own, in place of the operation's.
        only: whether a shape takes part.
        quick: whether it is part of a quick look.
        slow: names of peers that a quick look leaves out.
        dtype: of features and parameters; None takes them as `inputs` gives them.
    """

    operation: str
    kind: str
    inputs: Callable
    contestants: dict = field(default_factory=dict)
    beside: dict = field(default_factory=dict)
    wanted: tuple = ()
    columns: Callable = lambda shape, arguments, times: {}
    checked: Callable = lambda arguments: [arguments]
    shapes: tuple = ()
    only: Callable = lambda shape: True
    quick: bool = True
    slow: tuple = ()
    dtype: torch.dtype | None = None

    @property
    def names(self):
        return [*self.beside, *self.contestants]

    def quickly(self):
        """Without the slow peers."""
        return self.without(self.slow)

    def without(self, names):
        """Without peers of these names."""
        return replace(self, contestants={n: make for n, make in self.contestants.items() if n not in names})

    @property
    def of_calls(self):
        """Whether it times what a call costs, rather than what its kernels do."""
        return self.kind.endswith(", us")

    def mode(self):
        """In which the calls run, as a context."""
        return torch.inference_mode(not self.wanted)

    def call(self, name, arguments):
        """What a contestant is timed at: a function of no arguments."""
        if name in self.beside:
            return self.beside[name](arguments)
        function = self.contestants[name](arguments)
        if isinstance(function, torch.nn.Module):
            function.to(self.dtype)
        return step(function, arguments, self.wanted) if self.wanted else functools.partial(function, **arguments)

    def wrong(self, arguments):
        """What verification says of the very arguments that are timed, as messages; [] if all is right."""
        return [
            problem
            for checked in self.checked(arguments)
            for problem in wrong(self.operation, checked, gradients=bool(self.wanted))
        ]

    def row(self, shape, device, options):
        """Times all in turn. A wrong result has no speed-up."""
        arguments = in_dtype(self.inputs(shape, device), self.dtype)
        with self.mode():
            times = self.race(arguments, device, options)
        row = {"kind": self.kind, "shape": shape_name(shape)}
        if self.of_calls:  # interruptions only add to it
            row |= {name: times[name].best * 1e6 for name in self.names}
        else:
            row |= {name: times[name].median * 1e3 for name in self.names}
        if self.dtype:
            row["dtype"] = str(self.dtype).removeprefix("torch.")
        if problems := self.wrong(arguments):
            return row | {"wrong": problems}
        against = {
            f"vs {name}": times[name].over(times["ours"]) for name in self.contestants if name not in ("ours", TRITON)
        }
        if against:
            row |= against | {"speed-up": min(against.values())}
        return row | self.columns(shape, arguments, times)

    def race(self, arguments, device, options):
        """On a GPU kernels are timed as graphs, on more data than its cache holds."""
        if device != "cuda" or self.of_calls:
            return race({name: self.call(name, arguments) for name in self.names}, device=device, **options)
        sets = beyond_the_cache(arguments)
        graphs = {name: captured([self.call(name, one) for one in sets]) for name in self.names}
        return race(graphs, device=device, jobs=len(sets), **options)


@dataclass(frozen=True, eq=False)
class Memory:
    """What calls need at most, in MB, beyond what is `known` (arguments -> bytes) to stay: another kind of row."""

    kind: str
    inputs: Callable
    contestants: dict
    wanted: tuple = ()
    known: Callable = lambda arguments: 0
    columns: Callable = lambda shape, arguments: {}
    shapes: tuple = ()
    only: Callable = lambda shape: True
    quick: bool = True
    dtype: torch.dtype | None = None

    def quickly(self):
        return self

    def without(self, names):
        return replace(self, contestants={n: make for n, make in self.contestants.items() if n not in names})

    def row(self, shape, device, options):
        arguments = in_dtype(self.inputs(shape, device), self.dtype)
        row = {"kind": self.kind, "shape": shape_name(shape), **self.columns(shape, arguments)}
        with torch.inference_mode(not self.wanted):
            for name, make in self.contestants.items():
                function = make(arguments)
                call = functools.partial(function, **arguments)
                peak = peak_memory(step(function, arguments, self.wanted) if self.wanted else call, device)
                row[name] = None if peak is None else max(0, peak - self.known(arguments)) / 1e6
        return row


def plan(benchmark, quick, device="cpu", *, dtype=None, without=()):
    """All (shape, contest or memory) of an operation's benchmark, a module of this package; shape after shape.
    `without` names peers that take no part."""
    shapes = benchmark.QUICK if quick else benchmark.SHAPES
    parts = [part.quickly() for part in benchmark.PARTS if part.quick] if quick else benchmark.PARTS
    if dtype is not None:  # what compares dtypes has its own
        parts = [replace(part, dtype=dtype) for part in parts if "bfloat16" not in part.kind]
    parts = [part.without((*without, *([] if device == "cuda" else [TRITON]))) for part in parts]
    for shape in shapes:
        yield from ((shape, part) for part in parts if not part.shapes and part.only(shape))
    for part in parts:
        yield from ((shape, part) for shape in part.shapes)


def in_dtype(arguments, dtype):
    """The arguments with their floating-point tensors in a dtype; None leaves them."""
    if dtype is None:
        return arguments
    floating = lambda name, value: isinstance(value, torch.Tensor) and value.is_floating_point() and name not in SINGLE
    return {name: value.to(dtype) if floating(name, value) else value for name, value in arguments.items()}


def shape_name(shape):
    return "x".join(map(str, shape))


def contestants(operation, *names, compiled=""):
    """Ours, on each backend that a GPU has, and its peers: "eager" is the peer of the operation's name, "compile" the
    same compiled (or its variant `compiled`), any other name its variant so called."""
    ours = getattr(functional, operation)
    return {"ours": lambda arguments: ours, TRITON: lambda arguments: functools.partial(ours, backend="triton")} | {
        name: _compiled(operation + compiled)
        if name == "compile"
        else _looked_up(peers, operation if name == "eager" else f"{operation}_{name}")
        for name in names
    }


def installed(contestants, needs):
    """Without the peers whose package, `needs` by name, isn't installed: a benchmark has `needs` as ``NEEDS``, and
    :func:`left_out` tells."""
    return {name: make for name, make in contestants.items() if not missing(needs.get(name))}


def left_out(benchmark):
    """Peers of an operation's benchmark that can't take part: their packages by their names."""
    return {name: package for name, package in getattr(benchmark, "NEEDS", {}).items() if missing(package)}


def missing(package):
    return package is not None and importlib.util.find_spec(package) is None


def _looked_up(module, name):
    return lambda arguments: getattr(module, name)


def _compiled(name):
    return lambda arguments: peers.compiled(getattr(peers, name))


def step(function, arguments, wanted):
    """A forward and a backward pass, as a function of no arguments. A module among the contestants has parameters of
    its own, in place of arguments."""
    leaves = {
        name: value.detach().requires_grad_(name in wanted)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    tensors = [leaves[name] for name in wanted]
    if isinstance(function, torch.nn.Module):
        tensors = [*([leaves["image"]] if "image" in wanted else []), *function.parameters()]
    upstream = [torch.randn_like(output) for output in _wanted(function(**leaves))]
    return lambda: torch.autograd.grad(_wanted(function(**leaves)), tensors, upstream)


def _wanted(result):
    """An operation's results as a tuple, without those that weren't asked for."""
    return tuple(r for r in result if r is not None) if isinstance(result, tuple) else (result,)


def wrong(operation, arguments, gradients=False):
    """What verification says, as messages; [] if all is right."""
    first = next(iter(arguments.values()))
    case = Case("benchmark", "benchmark", lambda draw: arguments, False)
    standard = tolerance.Standard(operation, case, first.dtype, first.device.type, gradients=gradients)
    return [str(verdict) for verdict in standard.test(getattr(functional, operation)) if not verdict.passed]


def small_calls(operation, inputs, shape, wanted):
    """What a call costs that computes next to nothing, beside five eager operations and SDPA on as little."""

    def contest(kind, wanted):
        return Contest(
            operation,
            kind,
            inputs,
            {"ours": _looked_up(functional, operation)},
            {"five operations": _little(_five_operations, wanted), "sdpa": _little(_sdpa, wanted)},
            wanted,
            shapes=(shape,),
        )

    return contest("small call, us", ()), contest("small call, forward + backward, us", wanted)


def _little(function, wanted):
    def make(arguments):
        device = next(iter(arguments.values())).device
        inputs = {name: torch.randn(1, 1, 4, 8, device=device) for name in ("query", "key", "value")}
        return step(function, inputs, tuple(inputs)) if wanted else functools.partial(function, **inputs)

    return make


def _five_operations(query, key, value):
    return ((query * key).sum(-1, keepdim=True).softmax(-2) * value).add(query)


def _sdpa(query, key, value):
    return scaled_dot_product_attention(query, key, value)
