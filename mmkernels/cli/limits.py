"""``limits``."""

import click

from .common import console, device_option, json_option, plot_option, progress_bar, threads_option


@click.command()
@click.option("--architecture", default="article", show_default=True, help="See mmkernels.models.ImageTextModel.")
@click.option("--fusion", default="spatial", show_default=True, help="How image and text meet.")
@click.option("--size", type=click.IntRange(10), default=224, show_default=True, help="Height and width of the images.")
@click.option("--tokens", type=click.IntRange(1), default=16, show_default=True, help="Of a text.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    multiple=True,
    help="Can be given more than once; default: 1, 2, 4, ... 32.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed steps a point.")
@threads_option
@device_option
@plot_option("Also draw it to FILE (needs matplotlib).")
@json_option
def limits(batch_size, device, plot_path, json_path, **chosen):
    """Time and peak memory of a training step, fused, plain and recomputed, for every batch size."""
    import torch
    from rich.table import Table

    from .. import limits as measurement
    from .common import write_json

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = tuple(sorted(set(batch_size))) or measurement.BATCH_SIZES
    try:
        settings = measurement.Settings(device=device, **chosen)
        with progress_bar("limits") as progress:
            found = measurement.run(settings, batch_sizes=sizes, progress=progress)
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    table = Table("batch size", "variant", "MB", "ms", title="A training step")
    for point in found["points"]:
        numbers = ["-" if point[key] is None else f"{point[key]:,.1f}" for key in ("memory_mb", "milliseconds")]
        table.add_row(str(point["batch_size"]), point["variant"], *numbers)
    console.print(table)
    for point in found["points"]:
        if point["error"]:
            console.print(f"{point['variant']}, {point['batch_size']} samples: {point['error']}", markup=False)
    write_json(json_path, found)
    if plot_path:
        try:
            measurement.plot(found).savefig(plot_path, dpi=120)
        except ImportError as error:
            raise click.ClickException(str(error)) from error
