"""``evaluate``."""

from pathlib import Path

import click

from .common import device_option, json_option, threads_option, write_json
from .own_data import (
    batch_option,
    csv_argument,
    draw,
    explained,
    measured,
    model_argument,
    prepare,
    problems,
    read,
    root_option,
    show_metrics,
    strict_option,
)


@click.command()
@model_argument
@csv_argument
@click.option(
    "--plots",
    type=click.Path(file_okay=False, writable=True),
    metavar="FOLDER",
    help="Also draw confusion and curves (of a regression: predictions over numbers) into FOLDER.",
)
@root_option
@strict_option
@batch_option
@threads_option
@device_option
@json_option
def evaluate(model, csv, plots, root, strict, batch_size, threads, device, json_path):
    """How well a trained MODEL answers the rows of CSV, whose labels are known."""
    with explained():
        from .. import saving

        fitted, preprocessing = saving.load(model, device=prepare(threads, device))
        if preprocessing is None or preprocessing.task is None:
            raise click.ClickException(f"{model} was saved without what turns files into inputs")
        table = read(csv, root, preprocessing, strict=strict)
        metrics = measured(fitted, table, batch_size)
        show_metrics({f"{len(table)} rows": metrics})
        if plots:
            Path(plots).mkdir(parents=True, exist_ok=True)
            draw(fitted, table, plots, batch_size, metrics)
        found = {"task": preprocessing.task, "labels": preprocessing.labels, "metrics": metrics}
        write_json(json_path, {**found, "rows": len(table), "skipped": problems(table)})
