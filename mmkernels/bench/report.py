"""Rows and figures of a benchmark: as a table, as JSON, as a plot.

A row is a dictionary of plain values with ``shape`` and ``kind``; a figure is one claim, its target, and what was
reached.
"""

import datetime
import json
import math
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Figure:
    """One claim about a whole benchmark: passes if `reached` is on the right side of `target`."""

    name: str
    target: float
    reached: float
    at_most: bool = False
    unit: str = "x"

    @property
    def passed(self):
        return self.reached <= self.target if self.at_most else self.reached >= self.target

    def as_json(self):
        return {**asdict(self), "passed": self.passed}


def mean(values):
    """The geometric mean: ratios multiply. NaN if there is nothing."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def environment(device, quick):
    from .. import __version__
    from ..info import huge_pages, last_level_cache, processor

    return {
        "mmkernels": __version__,
        "torch": torch.__version__,
        "device": device,
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
        "huge_pages": huge_pages(),
        "quick": quick,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def show(found, console):
    """One table a kind of row, then the figures."""
    from rich.table import Table

    env = found["environment"]
    console.print(
        f"{env['processor']}, {env['threads']} threads, torch {env['torch']}"
        + (" — a quick look: few shapes, few rounds" if env["quick"] else "")
    )
    for operation, result in found["operations"].items():
        for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["kind"] == kind]
            columns = list(
                dict.fromkeys(name for row in rows for name in row if name not in ("kind", "wrong", "speed-up"))
            )
            table = Table(title=f"{operation}: {kind}")
            for column in columns:
                table.add_column(column, justify="left" if column == "shape" else "right")
            for row in rows:
                table.add_row(*(_text(row.get(column)) for column in columns))
            console.print(table)
            for row in rows:
                for problem in row.get("wrong", ()):
                    console.print(f"[red]{operation} {row['shape']} is wrong, so it has no speed-up[/]: {problem}")
        table = Table("figure", "target", "reached", "", title=f"{operation}: figures")
        for figure in result["figures"]:
            sign = "<=" if figure["at_most"] else ">="
            table.add_row(
                figure["name"],
                f"{sign} {figure['target']:.2f}{figure['unit']}",
                f"{figure['reached']:.2f}{figure['unit']}"
                if figure["reached"] == figure["reached"]
                else "nothing measured",
                "[green]pass[/]" if figure["passed"] else "[red]miss[/]",
            )
        console.print(table)


def as_json(found):
    """Strict JSON: a number that doesn't exist is null."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(found), indent=1)


def plot(found, path):
    """Bars: a row of panels an operation, a panel a kind of call that has speed-ups, a group of bars a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        operation: {
            kind: rows
            for kind in dict.fromkeys(row["kind"] for row in result["rows"])
            if (rows := [row for row in result["rows"] if row["kind"] == kind and row.get("speed-up")])
        }
        for operation, result in found["operations"].items()
    }
    panels = {operation: kinds for operation, kinds in panels.items() if kinds}
    columns = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        len(panels), columns, figsize=(5 * columns, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for line, (operation, kinds) in zip(axes, panels.items()):
        for axis in line[len(kinds) :]:
            axis.set_axis_off()
        for axis, (kind, rows) in zip(line, kinds.items()):
            _bars(axis, rows)
            axis.set_title(f"{operation}: {kind.removesuffix(', ms')}", fontsize=9)
        line[0].set_ylabel("times faster", fontsize=8)
    env = found["environment"]
    figure.suptitle(f"{env['processor']}, {env['threads']} threads, torch {env['torch']}", fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _bars(axis, rows):
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("vs ")))
    width = 0.8 / len(names)
    highest = max(row.get(name) or 0 for row in rows for name in names)
    for i, name in enumerate(names):
        heights = [row.get(name) or 0 for row in rows]
        bars = axis.bar(
            [x + width * (i + 0.5) - 0.4 for x in range(len(rows))],
            heights,
            0.95 * width,
            label=f"than {name.removeprefix('vs ')}",
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=6)
    axis.axhline(1, color="black", linewidth=0.8)
    turn = {"rotation": 12, "ha": "right", "rotation_mode": "anchor"} if len(rows) > 3 else {}  # else they meet
    axis.set_xticks(range(len(rows)), [row["shape"].replace("x", "\u00d7") for row in rows], fontsize=7, **turn)
    axis.tick_params("y", labelsize=7)
    axis.set_ylim(0, 1.3 * highest)  # room for the legend
    axis.legend(loc="upper center", ncols=len(names), fontsize=7, frameon=False)


def _text(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        return "–" if value != value else f"{value:.2f}"
    return str(value)
