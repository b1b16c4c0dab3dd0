"""``predict``."""

from pathlib import Path

import click

from .common import console, device_option, threads_option
from .own_data import (
    batch_option,
    csv_argument,
    explained,
    model_argument,
    prepare,
    read,
    root_option,
    strict_option,
)


@click.command()
@model_argument
@csv_argument
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True),
    required=True,
    metavar="FILE",
    help="The CSV that is written: the same rows in the same order, and columns predicted, probability and error.",
)
@root_option
@strict_option
@batch_option
@threads_option
@device_option
def predict(model, csv, out, root, strict, batch_size, threads, device):
    """What a trained MODEL says of each row of CSV. A row that can't be read says why in the column error."""
    with explained():
        from .. import saving, training
        from ..data.labels import answer_columns

        if Path(out).exists() and Path(out).samefile(csv):
            raise click.BadParameter("is the CSV that is read", param_hint="--out")
        fitted, preprocessing = saving.load(model, device=prepare(threads, device))
        if preprocessing is None or preprocessing.task is None:
            raise click.ClickException(f"{model} was saved without what turns files into inputs")
        table = read(csv, root, preprocessing, strict=strict, labelled=False)
        answers = {}
        if len(table):
            answers = answer_columns(training.predict(fitted, table, batch_size=batch_size), preprocessing)
        places = {sample.row.line: number for number, sample in enumerate(table.samples)}
        columns = {
            name: [values[places[row.line]] if row.line in places else "" for row in table.sheet.rows]
            for name, values in answers.items()
        }
        table.sheet.write(out, {**columns, "error": [row.problem or "" for row in table.sheet.rows]})
    console.print(
        f"{len(table)} of {len(table.sheet.rows)} rows predicted: {click.format_filename(out)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
