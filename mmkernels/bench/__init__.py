"""How fast is it, next to what people run today and next to the memory's own speed?

One file an operation says what competes (its contests), :mod:`.timing` times them, :mod:`.report` shows the rows. That
file has ``SHAPES``, a ``QUICK`` choice of them, ``BUDGET`` (seconds a row), ``PARTS`` (contests and memory rows),
``figures(rows)``, and ``NEEDS`` where peers are from packages that may be missing. ``pytest bench/`` times the same
contests in pytest-benchmark's way.
"""

import importlib

import torch

from .. import functional


def run(operations=None, *, quick=False, threads=None, device=None, dtype=None, without=(), progress=None):
    """Times every operation and returns ``{"environment": ..., "operations": {name: {"rows": ..., "figures": ...,
    "left out": ...}}}``; left out are peers whose package isn't installed.

    Args:
        operations: names; default: all.
        quick: few shapes and rounds; its figures are only hints.
        threads: CPU threads to use; default: torch's setting.
        device: ``"cpu"`` or ``"cuda"``; default: the GPU if there is one. There a call's kernels are timed as a CUDA
            graph, on more data than the cache holds; small calls are timed as they are made.
        dtype: of features and parameters; default: float32, and where dtypes are compared both.
        without: peers to leave out, by name ("compile" takes longest).
        progress: called with (text, done, total).
    """
    from . import contests, report
    from .timing import keep_freed_memory

    keep_freed_memory()
    device = device or default_device()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        parts = {
            operation: list(contests.plan(benchmark_of(operation), quick, device, dtype=dtype, without=without))
            for operation in operations or functional.__all__
        }
        found = _run(parts, device, quick, progress or (lambda *_: None))
        return {"environment": report.environment(device, quick), "operations": found}
    finally:
        torch.set_num_threads(before)


def benchmark_of(operation):
    """The module of an operation's benchmark."""
    return importlib.import_module(f".{operation}", __name__)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(plans, device, quick, progress):
    from . import contests

    total = sum(map(len, plans.values()))
    done = 0
    found = {}
    for operation, plan in plans.items():
        module = benchmark_of(operation)
        options = contests.FEW_ROUNDS if quick else {"rounds": 12, "budget": module.BUDGET}
        rows = []
        for i, (shape, part) in enumerate(plan):
            progress(f"{operation} {contests.shape_name(shape)}: {part.kind}", done, total)
            if i and shape != plan[i - 1][0]:
                torch.compiler.reset()  # the compiled peers of the shape before
            rows.append(part.row(shape, device, options))
            done += 1
        torch.compiler.reset()
        found[operation] = {
            "rows": rows,
            "figures": [figure.as_json() for figure in module.figures(rows)],
            "left out": contests.left_out(module),
        }
    progress("done", total, total)
    return found
