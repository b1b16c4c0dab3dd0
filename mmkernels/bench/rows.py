"""What the rows of all operations share: is the timed result right, how does it compare, what does it reach over all
shapes."""

import torch

from .. import functional, tolerance
from ..cases import Case
from . import report
from .timing import peak_memory, race


def wrong(operation, arguments, gradients=False):
    """What verification says of the very inputs that are timed, as messages; [] if all is right."""
    first = next(iter(arguments.values()))
    case = Case("benchmark", "benchmark", lambda draw: arguments, False)
    standard = tolerance.Standard(operation, case, first.dtype, first.device.type, gradients=gradients)
    return [str(verdict) for verdict in standard.test(getattr(functional, operation)) if not verdict.passed]


def compare(row, times, ours, others, problems):
    """Adds the others' times and our speed-ups to a row; a wrong result has none."""
    row |= {name: times[name].median * 1e3 for name in others}
    if problems:
        return row | {"wrong": problems}
    against = {f"vs {name}": times[name].over(times[ours]) for name in others}
    return row | against | {"speed-up": min(against.values())}


def forward(operation, name, arguments, contestants, options, **more):
    """A row of inference; `more` contestants compete, but aren't peers that do the same."""
    with torch.inference_mode():
        times = race({**{n: lambda f=f: f(**arguments) for n, f in contestants.items()}, **more}, **options)
    row = {"kind": "forward, ms", "shape": name, "ours": times["ours"].median * 1e3} | {
        n: times[n].median * 1e3 for n in more
    }
    return compare(row, times, "ours", [n for n in contestants if n != "ours"], wrong(operation, arguments)), times


def training(operation, name, arguments, contestants, options, *, kind="forward + backward, ms", wanted, check=True):
    """A row of training: the gradients of the arguments named in `wanted`."""
    steps = {n: step(f, arguments, wanted) for n, f in contestants.items()}
    times = race(steps, **options)
    row = {"kind": kind, "shape": name, "ours": times["ours"].median * 1e3}
    problems = (
        wrong(
            operation,
            {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()},
            gradients=True,
        )
        if check
        else []
    )
    return compare(row, times, "ours", [n for n in contestants if n != "ours"], problems)


def step(function, arguments, wanted):
    """A forward and a backward pass; a module among the contestants has parameters of its own, in place of
    arguments."""
    leaves = {
        n: v.detach().requires_grad_(n in wanted) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    tensors = [leaves[n] for n in wanted if n in leaves]
    if hasattr(function, "parameters"):
        tensors = [*([leaves["image"]] if "image" in wanted else []), *function.parameters()]
    upstream = torch.ones_like(function(**leaves))
    return lambda: torch.autograd.grad(function(**leaves), tensors, upstream)


def memory(kind, name, calls, known, device):
    """A row of what calls need beyond what is `known` to stay (bytes), in MB."""
    row = {"kind": kind, "shape": name}
    for n, call in calls.items():
        peak = peak_memory(call, device)
        row[n] = None if peak is None else max(0, peak - known) / 1e6
    return row


def values(rows, kind, name, *, only=lambda row: True):
    """One column of the rows of a kind; a wrong row has no value and counts as never reached."""
    return [row.get(name, float("nan")) for row in rows if row["kind"].startswith(kind) and only(row)]


def least(numbers):
    return float("nan") if not numbers or any(n != n for n in numbers) else min(numbers)


def against_the_best(rows, kind, mean, floor=1.0):
    """Two figures: our speed-up over the best of the others for each shape, on average and at worst."""
    reached = values(rows, f"{kind},", "speed-up")
    yield report.Figure(f"{kind}, against the best peer, mean", mean, report.mean(reached))
    yield report.Figure(f"{kind}, against the best peer, least", floor, least(reached))


def library_gflops(device, size=2048):
    """GFLOP/s of torch.mm on square matrices: what the machine gives to a well-kept library."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / race({"mm": lambda: a @ b}, device=device, rounds=7, budget=2)["mm"].median / 1e9
