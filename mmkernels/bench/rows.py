"""What the rows of all operations share: is the timed result right, how does it compare, what does it reach over all shapes."""

import torch

from .. import functional, tolerance
from ..cases import Case
from . import report


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
    from .timing import race

    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size ** 3 / race({"mm": lambda: a @ b}, device=device, rounds=7, budget=2)["mm"].median / 1e9
