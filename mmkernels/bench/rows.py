"""What figures are made of: columns of rows over all shapes, and the rates that rows are compared with."""

import functools

import torch

from . import report
from .timing import race


def values(rows, kind, name, *, only=lambda row: True):
    """One column of the rows whose kind begins so; a wrong row has no value and counts as never reached."""
    return [row.get(name, float("nan")) for row in rows if row["kind"].startswith(kind) and only(row)]


def least(numbers):
    return float("nan") if not numbers or any(n != n for n in numbers) else min(numbers)


def most(numbers):
    return -least([-n for n in numbers])


def against_the_best(rows, kind, mean, floor=1.0):
    """Two figures: our speed-up over the best of the others for each shape, on average and at worst."""
    reached = values(rows, f"{kind},", "speed-up")
    yield report.Figure(f"{kind}, against the best peer, mean", mean, report.mean(reached))
    yield report.Figure(f"{kind}, against the best peer, least", floor, least(reached))


def small_calls(rows):
    """Two figures: what a call costs that computes next to nothing."""
    for kind, target in (("small call", 25), ("small call, forward + backward", 150)):
        found = [row["ours"] if "wrong" not in row else float("nan") for row in rows if row["kind"] == f"{kind}, us"]
        if found:
            yield report.Figure(kind, target, most(found), at_most=True, unit=" us")


def share_of_library(flops):
    """Columns of a contest: how many operations a second, given `flops` of a shape, next to torch.mm."""

    def columns(shape, arguments, times):
        rate = flops(*shape) / times["ours"].median / 1e9
        device = next(iter(arguments.values())).device.type
        return {"GFLOP/s": rate, "share of torch.mm": rate / _library_gflops(device, torch.get_num_threads())}

    return columns


@functools.cache
def _library_gflops(device, threads, size=2048):
    """GFLOP/s of torch.mm on square matrices: what the machine gives to a well-kept library."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / race({"mm": lambda: a @ b}, device=device, rounds=7, budget=2)["mm"].median / 1e9
