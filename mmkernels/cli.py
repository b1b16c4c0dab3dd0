"""The command line: ``info``, ``verify``, ``bench``, ``patch`` and ``demo``. Each only shows what a function of the
package returns."""

import dataclasses
import functools
import importlib
import io
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import __version__, functional
from . import backends as registry

console = Console()
if not console.is_terminal:
    console = Console(width=132)  # in a file or a pipe no line has to fit a screen
json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Also write the result to FILE as JSON.",
)


def names_option(flag, known, text):
    return click.option(
        flag, multiple=True, type=click.Choice(list(known)), help=text + " Can be given more than once."
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmkernels")
def main():
    """Fused score -> softmax -> multiply kernels for image and text features."""


@main.command()
@json_option
def info(json_path):
    """What was built, what this machine has, and which backend can run."""
    from . import info as page

    found = page.collect()
    page.show(found, console)
    _write(json_path, found)


@main.command()
@names_option("--operation", functional.__all__, "Operation to check; default: all.")
@click.option(
    "--backend",
    multiple=True,
    metavar="NAME",
    help="Backend to check; default: all that can run. Can be given "
    "more than once; one that can run nowhere then counts as a failure.",
)
@click.option(
    "--dtype",
    multiple=True,
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Dtype to check; default: all. Can be given more than once.",
)
@click.option("--small", is_flag=True, help="Only the small cases.")
@click.option("--seed", default=0, show_default=True, help="Draws the values.")
@json_option
def verify(operation, backend, dtype, small, seed, json_path):
    """Compares every backend with float64, results and gradients; exits with 1 if anything disagrees."""
    import torch

    from . import verify as checker

    unknown = [name for name in backend if name not in registry.names()]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(registry.names())}", param_hint="--backend")
    with _progress("verify") as progress:
        rows = checker.run(
            list(operation) or None,
            list(backend) or None,
            seed=seed,
            small=small,
            dtypes=[getattr(torch, name) for name in dtype] or None,
            progress=lambda done, total: progress("verify", done, total),
        )
    checker.show(rows, console)
    _write(json_path, checker.as_json(rows))
    if not checker.passed(rows):
        sys.exit(1)


@main.command()
@names_option("--operation", functional.__all__, "Operation to time; default: all.")
@click.option("--models", is_flag=True, help="Whole public models, plain and patched, in place of operations.")
@click.option("--model", multiple=True, metavar="NAME", help="Model to time, by a part of its name; implies --models.")
@click.option("--quick", is_flag=True, help="A shape an operation, few rounds: a minute, most of it torch.compile's.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's setting.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU if there is one.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Also draw the speed-ups to FILE (needs matplotlib).",
)
@json_option
def bench(operation, models, model, quick, threads, device, plot_path, json_path):
    """Times every operation next to eager PyTorch, torch.compile, and the memory's own speed; or whole models."""
    from . import bench as benchmark
    from .bench import report

    if models or model:
        if operation or plot_path or device == "cuda":
            raise click.UsageError("--models goes without --operation, --plot and --device cuda")
        return _bench_models(model, quick, threads, json_path)
    with _progress("bench") as progress:
        found = benchmark.run(list(operation) or None, quick=quick, threads=threads, device=device, progress=progress)
    report.show(found, console)
    if json_path:
        report.save(found, json_path)
    if plot_path:
        from .bench.plot import plot

        try:
            plot(found, plot_path)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"--plot needs {error.name}: pip install mmkernels[cli]") from error


def _bench_models(parts, quick, threads, json_path):
    from .bench import models, report

    names = [m.name for m in models.MODELS if not parts or any(part.lower() in m.name.lower() for part in parts)]
    if not names:
        known = ", ".join(m.name for m in models.MODELS)
        raise click.BadParameter(f"no model's name has {' or '.join(parts)}; known: {known}", param_hint="--model")
    with _progress("bench") as progress:
        found = models.run(names, quick=quick, threads=threads, progress=progress)
    models.show(found, console)
    if json_path:
        report.save(found, json_path)


@main.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@json_option
def patch(factory, json_path):
    """What mmkernels.patch would replace in a model, and what not and why: a dry run.

    FACTORY is a function of MODULE, which is looked for in the current folder, too, and gives the model when it is
    called without arguments. Or it is the model.
    """
    from rich.table import Table

    from . import integrations

    report = integrations.patch(_model(factory), dry_run=True)
    title, *_ = str(report).splitlines()
    table = Table("module", "class", "would be", "note", title=title)
    for row in report.rows:
        table.add_row(row.name or "(the model)", row.kind, row.operation or "-", row.reason)
    console.print(table if report.rows else title)
    _write(json_path, {"title": title, "rows": [dataclasses.asdict(row) for row in report.rows]})


def _model(factory):
    """The model that MODULE:FACTORY names."""
    from torch import nn

    name, _, path = factory.partition(":")
    wrong = functools.partial(click.BadParameter, param_hint="MODULE:FACTORY")
    if not name or not path:
        raise wrong(f"expected the module's name and the function's, joined by a colon, got {factory!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise wrong(f"{name} can't be imported: it needs {error.name}, which isn't installed") from error
        raise wrong(f"there is no module {error.name}: neither installed nor in {Path.cwd()}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise wrong(f"{getattr(found, '__name__', found)} has no {part}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise wrong(f"{path} must be a function or a torch.nn.Module, got {type(found).__name__}")
    model = found()
    if not isinstance(model, nn.Module):
        raise wrong(f"{path}() must return a torch.nn.Module, got {type(model).__name__}")
    return model


@main.command()
@click.option(
    "--out",
    "out_dir",
    type=click.Path(file_okay=False, writable=True),
    default="out/demo",
    show_default=True,
    metavar="DIRECTORY",
    help="Where pictures and the report go.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training pictures.")
@click.option("--limit", type=click.IntRange(min=1), help="Use so many training pictures only.")
@click.option(
    "--size",
    type=click.IntRange(min=10),
    help="Height and width of the pictures; the article's is 224, the default half of it.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's setting.")
@click.option("--seed", type=int, help="Draws everything random.")
@click.option(
    "--quick",
    is_flag=True,
    help="The whole job in less than a minute: float32 alone is verified, nothing is timed, and few small pictures are "
    "trained on. Its accuracy means nothing.",
)
@json_option
def demo(out_dir, epochs, limit, size, threads, seed, quick, json_path):
    """Trains the reference model on real pictures and words, and shows where it looks."""
    try:
        from . import demo as demonstration
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the demo needs {error.name}: pip install mmkernels[demo]") from error
    chosen = {"epochs": epochs, "limit": limit, "size": size, "threads": threads, "seed": seed}
    options = {"epochs": 1, "limit": 80, "size": 32} if quick else {}
    options |= {name: value for name, value in chosen.items() if value is not None}
    results = demonstration.run(
        out_dir, **options, verify=lambda: _verify_for_demo(quick), bench=None if quick else _bench_for_demo
    )
    _write(json_path, results)
    for name, found in results["models"].items():
        console.print(
            f"{name}: {found['validation']['accuracy']:.1%} of held-out pairs right, "
            f"trained in {found['seconds']:.0f} s"
        )
    for timing in results["timings"]:
        console.print(f"{timing['name']}: {timing['plain'] / timing['fused']:.2f} x faster fused", highlight=False)
    console.print(f"The report: {click.format_filename(out_dir)}/demo.html", highlight=False, soft_wrap=True)
    if not results["verify"]["passed"]:
        sys.exit(1)


def _verify_for_demo(quick):
    """Of the backends that can run; not the reference, which is the truth, unless there is nothing else."""
    import torch

    from . import info as page
    from . import verify as checker

    able = {row["backend"] for row in page.collect()["backends"] if row["reason"] is None}
    with _progress("verify") as progress:
        rows = checker.run(
            backends=sorted(able - {"reference"}) or None,
            small=True,
            dtypes=[torch.float32] if quick else None,
            progress=lambda done, total: progress("verify", done, total),
        )
    return {**checker.as_json(rows), "text": _shown(lambda where: checker.show(rows, where))}


def _bench_for_demo():
    from . import bench as benchmark
    from .bench import report

    with _progress("bench") as progress:
        found = benchmark.run(quick=True, progress=progress)
    return {**json.loads(report.as_json(found)), "text": _shown(lambda where: report.show(found, where))}


def _shown(show):
    """Shows something in the terminal, and returns it as text."""
    show(console)
    recorder = Console(width=132, record=True, file=io.StringIO())
    show(recorder)
    return recorder.export_text()


@contextmanager
def _progress(title):
    """``progress(text, done, total)``: a bar that goes away when it is done; where no terminal shows it, lines."""
    out = Console(stderr=True)
    if not out.is_terminal:
        yield _lines(out)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=out,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _lines(out, every=5.0):
    """Progress as a line every few seconds."""
    last = float("-inf")

    def progress(text, done, total):
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            out.print(f"{text} ({done} of {total} done)", highlight=False, soft_wrap=True)
            last = now

    return progress


def _write(path, found):
    if path:
        with open(path, "w") as file:
            json.dump(found, file, indent=1, default=str, allow_nan=True)
            file.write("\n")
