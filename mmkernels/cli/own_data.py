"""What ``train``, ``evaluate`` and ``predict`` share: their options, and how they tell what they found."""

from pathlib import Path

import click

from .common import console

root_option = click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False),
    metavar="FOLDER",
    help="What paths in the CSV are relative to, and can't leave; default: the CSV's folder.",
)
strict_option = click.option(
    "--strict", is_flag=True, help="Refuse a CSV with rows that can't be used, in place of skipping them."
)
batch_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples at a time."
)
csv_argument = click.argument("csv", type=click.Path(exists=True, dir_okay=False), metavar="CSV")
model_argument = click.argument("model", type=click.Path(exists=True, file_okay=False), metavar="MODEL")


def prepare(threads, device):
    """Sets the threads; returns the device."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class explained:
    """What a user can put right is said in a line, without a traceback."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (ValueError, OSError, ImportError)):
            raise click.ClickException(str(error)) from error


def read(csv, root, preprocessing, **options):
    """The table; its bad rows are shown."""
    from ..data import Table

    table = Table(csv, root, preprocessing, progress=True, **options)
    if table.problems:
        console.print(table.report(), style="yellow", highlight=False, markup=False, soft_wrap=True)
    return table


def problems(table):
    """The bad rows, as JSON has them."""
    return [{"line": row.line, "problem": row.problem} for row in table.problems]


def measured(model, table, batch_size):
    """Metrics of a model over a table, of a regression in the data's units."""
    from .. import training

    found = training.evaluate(model, table, batch_size=batch_size)
    if table.preprocessing.task == "regression":
        found |= {name: found[name] * table.preprocessing.number_std for name in ("mae", "rmse")}
    return found


def show_metrics(found):
    """A table of metrics, a column for each of `found`, a dict of dicts."""
    from rich.table import Table as Lines

    names = [name for name, value in next(iter(found.values())).items() if not isinstance(value, list)]
    lines = Lines("", *found)
    for name in names:
        lines.add_row(name, *(f"{metrics[name]:.4g}" for metrics in found.values()))
    console.print(lines)


def _draw_attention(model, table, folder, count=8):
    """Of some rows: the picture, and where the model looks; of the first with words also where each of them is read."""
    import torch

    from .. import plot
    from ..models.fusions import FUSIONS

    chosen = [index for index, sample in enumerate(table.samples) if sample.image is not None]
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:count]]
    if not chosen:
        return
    batch = table.collate([table[index] for index in chosen]).to(next(model.parameters()).device)
    inputs = {"text": None, **batch.inputs}
    model.eval()
    weights = model.attention(**inputs)
    items = [(table[index][0], table.samples[index].text or "", one) for index, one in zip(chosen, weights)]
    pictures = [each for image, _, one in items for each in (image, plot.attention(image, one))]
    plot.save(plot.gallery(pictures, [each for _, text, _ in items for each in (text, "")]), folder / "attention.png")
    first = next((number for number, (_, text, _) in enumerate(items) if text), None)
    if first is None or not FUSIONS[model.config["fusion"]].has_words:
        return
    image, text, _ = items[first]
    tokens = table.preprocessing.tokenizer.encode(text).tokens
    weights = model.word_attention(**inputs)[first, : len(tokens)]
    plot.save(plot.words(image, weights, tokens), folder / "words.png")


def draw(model, table, folder, batch_size, metrics):
    """Pictures of how well the model does on a table, into a folder: confusion and curves, or predictions over
    numbers; and where it looks, if there are images."""
    import torch

    from .. import plot, training

    preprocessing = table.preprocessing
    predicted = training.predict(model, table, batch_size=batch_size)
    target = torch.stack([table[index][-1] for index in range(len(table))])  # not all images at once
    folder = Path(folder)
    _draw_attention(model, table, folder)
    if preprocessing.task == "regression":
        plot.save(
            plot.regression(preprocessing.number(predicted), preprocessing.number(target)), folder / "numbers.png"
        )
        return
    several = preprocessing.task != "binary"
    plot.save(plot.curves(predicted, target, preprocessing.labels if several else None), folder / "curves.png")
    if preprocessing.task == "multilabel":
        return
    plot.save(plot.confusion(torch.tensor(metrics["confusion"]), preprocessing.labels), folder / "confusion.png")
