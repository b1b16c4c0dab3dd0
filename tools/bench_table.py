"""Writes the pages' tables of what a benchmark found.

python tools/bench_table.py      (make docs)

A table stands between ``<!-- FILE.json -->`` and ``<!-- end -->``; FILE is what ``python -m mmkernels bench --operation
NAME --json FILE`` wrote, or ``bench --models --json FILE``, ``compare --json FILE``, ``gpu_times.py --json FILE``.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/gpu-check.md")
PLACE = re.compile(r"(<!-- (\S+\.json) -->\n).*?(<!-- end -->)", re.S)
TRAINING = "forward + backward"


def page(name):
    """A page with its tables as they should be."""
    fill = lambda place: f"{place[1]}{table(json.loads((ROOT / place[2]).read_text(encoding='utf-8')))}{place[3]}"
    return PLACE.sub(fill, (ROOT / name).read_text(encoding="utf-8"))


def table(found):
    """What was raced against peers, forward and training in one line; and on what."""
    if "models" in found:
        return _models(found)
    if "ceilings" in found:
        return _on_a_gpu(found)
    if "rows" in found:
        return _compared(found)
    ((operation, result),) = found["operations"].items()
    rows = result["rows"]
    whose = _whose(operation)
    raced = {(*_line(row["kind"]), row["shape"]): row for row in rows if "speed-up" in row}
    lines = [
        "| | shape | forward, ms | times faster than | forward + backward, ms | times faster than |",
        "|---|---|---|---|---|---|",
    ]
    for title, shape in dict.fromkeys((title, shape) for title, _, shape in raced):
        cells = [cell for training in (False, True) for cell in _cells(raced.get((title, training, shape)))]
        title = ", ".join([title, *whose.get(shape, ())])
        lines.append(f"| {' | '.join([title, shape.replace('x', ' × '), *cells])} |")
    return "\n".join([*lines, "", _where(found), ""])


def _whose(operation):
    """Shapes by name -> whose they are, where the benchmark tells."""
    from mmkernels.bench import benchmark_of, contests

    return {contests.shape_name(shape): [name] for shape, name in getattr(benchmark_of(operation), "WHOSE", {}).items()}


def _where(found):
    env = found["environment"]
    where = f"{env['processor']} ({env['cpu_isa']}), {env['threads']} threads, torch {env['torch']}"
    return f"{where}; commit {env['commit']}, {env['time'][:10]}."


def _models(found):
    lines = [
        "| model | plain, s | patched, s | times faster (spread) | the layers | their share before | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["models"]:
        if "faster" not in row:
            continue
        layers, share = row.get("layers faster"), row.get("share of the model")
        plain, fused = row.get("plain, MB"), row.get("fused, MB")
        cells = [
            row["model"],
            f"{row['plain, s']:.2f}",
            f"{row['fused, s']:.2f}",
            f"**{row['faster']:.2f}** ({row['least']:.2f} to {row['most']:.2f})",
            "" if layers is None else f"{layers:.1f} times",
            "" if share is None else f"{100 * share:.0f} %",
            "" if plain is None else f"{plain:.0f} -> {fused:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _where(found), ""])


def _compared(found):
    """A line a model, the best one in bold."""
    from mmkernels import compare

    titles = ["architecture", "fusion", *compare.TITLES.values()]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    top = compare.best(found)
    for row in found["rows"]:
        first, *others = compare.cells_of(row)
        cells = [row["architecture"], row["fusion"], f"**{first}**" if row is top else first, *others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{compare.described(found['settings'])}; {_where(found)}", ""])


def _on_a_gpu(found):
    """A line an operation, shape and dtype; in bold whoever is fastest."""
    names = ("ours", "ours, triton", "sdpa", "eager")
    titles = ["shape", "dtype", "CUDA", "Triton", "SDPA", "plain PyTorch"]
    lines = []
    for operation, kind in dict.fromkeys((row["operation"], row["kind"]) for row in found["rows"]):
        lines += [f"**{operation}, {kind}, µs**", "", f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|"]
        for row in found["rows"]:
            if (row["operation"], row["kind"]) != (operation, kind):
                continue
            times = {name: row["us"][name] for name in names if name in row["us"]}
            cells = [f"{times[name]:.3g}" if name in times else "" for name in names]
            cells = [
                f"**{cell}**" if times.get(name) == min(times.values()) else cell for name, cell in zip(names, cells)
            ]
            lines.append(f"| {' | '.join([row['shape'].replace('x', ' × '), row['dtype'], *cells])} |")
        lines.append("")
    ceilings = "; ".join(
        f"{value:.3g} {name.rpartition(', ')[2]} ({name.rpartition(', ')[0]})"
        for name, value in found["ceilings"].items()
    )
    env = found["environment"]
    return "\n".join(
        [*lines, f"{env['processor']}, torch {env['torch']}; it gives {ceilings}; commit {found['commit']}.", ""]
    )


def _line(kind):
    """(title, whether it is training)"""
    title = kind.removesuffix(", ms")
    training = title.endswith(TRAINING)
    title = title.removesuffix(TRAINING if training else "forward").removesuffix(", ")
    return title or "the operation", training


def _cells(row):
    if row is None:
        return "", ""
    from mmkernels.bench.plot import PEERS

    against = {name.removeprefix("vs "): value for name, value in row.items() if name.startswith("vs ")}
    return f"{row['ours']:.3g}", ", ".join(f"{PEERS.get(peer, peer)} {value:.1f}" for peer, value in against.items())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name in PAGES:
        (ROOT / name).write_text(page(name), encoding="utf-8")
