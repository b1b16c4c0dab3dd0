"""``bench``."""

import click

from .. import functional
from .common import console, device_option, json_option, names_option, plot_option, progress_bar, threads_option


@click.command()
@names_option("--operation", functional.__all__, "Operation to time; default: all.")
@click.option("--models", is_flag=True, help="Whole public models, plain and patched, in place of operations.")
@click.option("--model", multiple=True, metavar="NAME", help="Model to time, by a part of its name; implies --models.")
@click.option("--quick", is_flag=True, help="A shape an operation, few rounds: a minute, most of it torch.compile's.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the features; default: float32."
)
@click.option("--without", multiple=True, metavar="PEER", help="Peer to leave out; compile takes longest.")
@threads_option
@device_option
@plot_option("Also draw the speed-ups to FILE (needs matplotlib).")
@json_option
def bench(operation, models, model, quick, dtype, without, threads, device, plot_path, json_path):
    """Times every operation next to eager PyTorch, torch.compile, and the memory's own speed; or whole models."""
    import torch

    from .. import bench as benchmark
    from ..bench import report

    if models or model:
        if operation or dtype or without or plot_path or device == "cuda":
            raise click.UsageError("--models goes without --operation, --dtype, --without, --plot and --device cuda")
        return _bench_models(model, quick, threads, json_path)
    with progress_bar("bench") as progress:
        found = benchmark.run(
            list(operation) or None,
            quick=quick,
            threads=threads,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            without=without,
            progress=progress,
        )
    report.show(found, console)
    if json_path:
        report.save(found, json_path)
    if plot_path:
        from ..bench.plot import plot

        try:
            plot(found, plot_path)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"--plot needs {error.name}: pip install mmkernels[cli]") from error


def _bench_models(parts, quick, threads, json_path):
    from ..bench import models, report

    names = [m.name for m in models.MODELS if not parts or any(part.lower() in m.name.lower() for part in parts)]
    if not names:
        known = ", ".join(m.name for m in models.MODELS)
        raise click.BadParameter(f"no model's name has {' or '.join(parts)}; known: {known}", param_hint="--model")
    with progress_bar("bench") as progress:
        found = models.run(names, quick=quick, threads=threads, progress=progress)
    models.show(found, console)
    if json_path:
        report.save(found, json_path)
