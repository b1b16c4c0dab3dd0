"""``compare``."""

import click

from .common import console, json_option, names_option, plot_option, progress_bar, threads_option, write_json
from .train import ARCHITECTURES, FUSIONS


@click.command()
@names_option("--architecture", ARCHITECTURES, "Architecture to train; default: all.")
@names_option("--fusion", FUSIONS, "Fusion to train; default: all.")
@click.option("--seeds", type=click.IntRange(min=1), help="Trainings of every model.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training pictures, of every training.")
@click.option("--limit", type=click.IntRange(min=1), help="Use so many pictures only.")
@click.option("--size", type=click.IntRange(min=22), help="Height and width of the pictures.")
@threads_option
@plot_option("Also draw accuracy over time to FILE.")
@json_option
def compare(architecture, fusion, seeds, epochs, limit, size, threads, plot_path, json_path):
    """Trains every architecture with every fusion on the demo's pictures and words: which one is it to be?"""
    from .. import compare as comparison

    chosen = {"seeds": seeds, "epochs": epochs, "limit": limit, "size": size}
    try:
        with progress_bar("compare") as progress:
            found = comparison.run(
                architecture or ARCHITECTURES,
                fusion or FUSIONS,
                settings=comparison.Settings(**{name: value for name, value in chosen.items() if value is not None}),
                threads=threads,
                progress=progress,
            )
    except (ImportError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    comparison.show(found, console)
    write_json(json_path, found)
    if plot_path:
        comparison.plot(found, plot_path)
