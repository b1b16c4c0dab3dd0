"""Is everything right on this machine? Every backend that can run, against float64, results and gradients.

Runs the cases of :mod:`mmkernels.cases` under the rule of :mod:`mmkernels.tolerance`. Nothing here needs the command
line's packages; :func:`show` needs ``rich``.
"""

from dataclasses import asdict, dataclass, field

import torch

from . import backends as registry
from . import cases, functional, tolerance


@dataclass
class Row:
    """One group of cases on one backend in one dtype; error and allowed are those of the worst tensor."""

    operation: str
    backend: str
    device: str
    dtype: str
    group: str
    cases: int = 0
    ratio: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    failures: list = field(default_factory=list)

    @property
    def passed(self):
        return not self.failures

    def add(self, case, verdicts):
        self.cases += 1
        for verdict in verdicts:
            if not verdict.passed:
                self.failures.append(f"{case.name}: {verdict}")
            if not verdict.problem and not verdict.ratio <= self.ratio:
                self.ratio = verdict.ratio
                self.error = verdict.error
                self.allowed = verdict.allowed


def run(operations=None, backends=None, *, devices=None, dtypes=None, seed=0, small=False, progress=None):
    """Compares and returns the rows.

    Args:
        operations, backends, devices, dtypes: names, and ``torch.dtype``s, to take; default: all there are. A backend
            that can't run on a device in a dtype is left out there. One that was named and can run on none of them in
            none fails with its reasons.
        seed: another one draws other values.
        small: only the small cases.
        progress: called with (done, total) after every case.
    """
    plan = list(_plan(operations or functional.__all__, backends, devices or _devices(), dtypes or cases.DTYPES, small))
    rows = {}
    for done, (operation, device, dtype, case, runners) in enumerate(plan, 1):
        standard = tolerance.Standard(operation, case, dtype, device, seed)
        for backend, reason in runners:
            key = (operation, backend, device, str(dtype).removeprefix("torch."), case.group)
            row = rows.setdefault(key, Row(*key))
            if reason is not None:
                row.failures[:] = [f"can't run: {reason}"]
                continue
            try:
                row.add(case, standard.test(getattr(functional, operation), backend=backend))
            except Exception as error:  # a crash of one case is a finding, not the end of the run
                row.cases += 1
                row.failures.append(f"{case.name}: {type(error).__name__}: {error}")
        if progress is not None:
            progress(done, len(plan))
    return sorted(rows.values(), key=lambda row: (row.operation, row.device, row.backend))


def passed(rows):
    """Whether anything was compared, and all of it agreed."""
    return bool(rows) and all(row.passed for row in rows)


def as_json(rows):
    return {"passed": passed(rows), "rows": [{**asdict(row), "passed": row.passed} for row in rows]}


def show(rows, console):
    """One line a backend, dtype and group, then every failure."""
    from rich.table import Table
    from rich.text import Text

    for operation in dict.fromkeys(row.operation for row in rows):
        table = Table(title=f"{operation}: the worst error against float64, and what is allowed")
        for column in ("backend", "dtype", "group"):
            table.add_column(column)
        for column in ("cases", "error", "allowed", "ratio", ""):
            table.add_column(column, justify="right")
        own = [row for row in rows if row.operation == operation]
        for row, following in zip(own, [*own[1:], None]):
            table.add_row(
                row.backend if row.device == "cpu" else f"{row.backend} ({row.device})",
                row.dtype,
                row.group,
                str(row.cases),
                f"{row.error:.1e}",
                f"{row.allowed:.1e}",
                f"{row.ratio:.2f}",
                "[green]ok[/]" if row.passed else f"[red]{len(row.failures)} failed[/]",
                end_section=following is not None and following.dtype != row.dtype,
            )
        console.print(table)
    for row in rows:
        for failure in row.failures:
            console.print(f"[red]{row.operation} {row.backend} {row.dtype}[/]:", Text(failure), highlight=False)
    count = sum(row.cases for row in rows)
    failures = sum(len(row.failures) for row in rows)
    console.print(f"{count} comparisons, {failures} failed" if failures else f"{count} comparisons, all agree")


def _devices():
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _plan(operations, wanted, devices, dtypes, small):
    """(operation, device, dtype, case, [(backend, None or why it can't run)])"""
    unknown = [name for name in wanted or () if name not in registry.names()]
    if unknown:
        raise ValueError(f"backends must be of {', '.join(registry.names())}, got {unknown[0]!r}")
    for operation in operations:
        places = [(device, dtype) for device in devices for dtype in dtypes]
        reasons = {
            place: {name: registry.why_not(name, operation, *place) for name in wanted or registry.names()}
            for place in places
        }
        useless = [name for name in wanted or () if all(reasons[place][name] for place in places)]
        for device, dtype in places:
            able = [
                (name, reason) for name, reason in reasons[device, dtype].items() if reason is None or name in useless
            ]
            for case in cases.selected(operation, small=small):
                runners = [(name, reason) for name, reason in able if case.small or not cases.is_slow(name, device)]
                if runners:
                    yield operation, device, dtype, case, runners
