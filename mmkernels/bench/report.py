"""Rows and figures of a benchmark: as a table and as JSON; :mod:`.plot` draws them.

A row is a dictionary of plain values with ``shape`` and ``kind``; a figure is one claim, its target, and what was
reached.
"""

import datetime
import json
import math
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """What the times belong to: the code, and the machine."""
    return {
        **machine(device),
        "commit": commit(),
        "quick": quick,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def machine(device):
    """The part of it that stays the same from run to run."""
    from .. import __version__, backends
    from ..info import huge_pages, last_level_cache, processor

    return {
        "mmkernels": __version__,
        "torch": torch.__version__,
        "device": device,
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu_isa": getattr(backends.extension, "cpu_isa", None),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
        "huge_pages": huge_pages(),
    }


def commit():
    """Of the checkout that the package lies in, "-dirty" where a file has changed since; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def title(env):
    return f"{env['processor']} ({env['cpu_isa']}), {env['threads']} threads, torch {env['torch']}"


def show(found, console):
    """One table a kind of row, then the figures."""
    from rich.table import Table

    env = found["environment"]
    console.print(title(env) + (" — a quick look: few shapes, few rounds" if env["quick"] else ""))
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
                table.add_row(*(text(row.get(column)) for column in columns))
            console.print(table)
            for row in rows:
                for problem in row.get("wrong", ()):
                    console.print(f"[red]{operation} {row['shape']} is wrong, so it has no speed-up[/]: {problem}")
        show_figures(operation, result["figures"], console)
        for line in left_out_lines(operation, result["left out"]):
            console.print(f"[yellow]{line}[/]")


def show_figures(title, figures, console):
    from rich.table import Table

    table = Table("figure", "target", "reached", "", title=f"{title}: figures")
    for figure in figures:
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


def left_out_lines(operation, left_out):
    """Who isn't there, `left_out` as :func:`.contests.left_out` gives it, as sentences."""
    for peer, package in left_out.items():
        yield f"{operation}: the peer '{peer}' is left out, {package} isn't installed (pip install mmkernels\\[bench])"


def as_json(found):
    """Strict JSON: a number that doesn't exist is null."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(found), indent=1)


def save(found, path):
    with open(path, "w") as file:
        file.write(as_json(found) + "\n")


def text(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        return "–" if value != value else f"{value:.2f}"
    return str(value)
