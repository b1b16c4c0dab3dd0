"""What commands share: where they write, and the options that several have."""

import io
import json
import time
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

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
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's setting.")
device_option = click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU if there is one.")


def plot_option(text):
    return click.option(
        "--plot", "plot_path", type=click.Path(dir_okay=False, writable=True), metavar="FILE", help=text
    )


def names_option(flag, known, text):
    return click.option(
        flag, multiple=True, type=click.Choice(list(known)), help=text + " Can be given more than once."
    )


def shown(show):
    """Shows something in the terminal, and returns it as text."""
    show(console)
    recorder = Console(width=132, record=True, file=io.StringIO())
    show(recorder)
    return recorder.export_text()


@contextmanager
def progress_bar(title):
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


def write_json(path, found):
    if path:
        with open(path, "w") as file:
            json.dump(found, file, indent=1, default=str, allow_nan=True)
            file.write("\n")
