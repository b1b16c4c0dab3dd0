"""``demo``."""

import json
import sys
from pathlib import Path

import click

from .. import backends
from .common import console, json_option, progress_bar, shown, threads_option, write_json


@click.command()
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
    type=click.IntRange(min=22),
    help="Height and width of the pictures; the article's is 224.",
)
@threads_option
@click.option("--seed", type=int, help="Draws everything random.")
@click.option(
    "--quick",
    is_flag=True,
    help="The whole job in less than a minute: float32 alone is verified, nothing is timed, and few small pictures are "
    "trained on. Its accuracy means nothing.",
)
@json_option
def demo(out_dir, epochs, limit, size, threads, seed, quick, json_path):
    """Trains a model on real pictures and words, and shows where it looks."""
    if backends.extension is None:
        raise click.ClickException(
            f"the demo would compare plain PyTorch with itself: {backends.extension_error}. mmkernels was imported "
            f"from {Path(backends.__file__).parent}"
        )
    try:
        from .. import demo as demonstration
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the demo needs {error.name}: pip install mmkernels[demo]") from error
    chosen = {"epochs": epochs, "limit": limit, "size": size, "threads": threads, "seed": seed}
    options = {"epochs": 1, "limit": 80, "size": 32} if quick else {}
    options |= {name: value for name, value in chosen.items() if value is not None}
    results = demonstration.run(
        out_dir,
        **options,
        verify=lambda: _verify_for_demo(quick),
        bench=None if quick else _bench_for_demo,
        grounding=not quick,
    )
    write_json(json_path, results)
    for name, found in results["models"].items():
        console.print(
            f"{name}: {found['validation']['accuracy']:.1%} of held-out pairs right, "
            f"trained in {found['seconds']:.0f} s"
        )
    for timing in (results["speed"]["layer"], results["speed"]["model"]):
        console.print(f"{timing['what']}: {timing['plain'] / timing['fused']:.2f} x faster fused", highlight=False)
    if results["grounding"]:
        times = results["grounding"]["forward"]
        gain = times["sdpa"] / times["ours"]
        console.print(f"Grounding DINO's fusion layer: {gain:.1f} x faster than with PyTorch's SDPA", highlight=False)
    console.print(f"The report: {click.format_filename(out_dir)}/demo.html", highlight=False, soft_wrap=True)
    if not results["verify"]["passed"]:
        sys.exit(1)


def _verify_for_demo(quick):
    """Of the backends that can run; not the reference, which is the truth."""
    import torch

    from .. import info as page
    from .. import verify as checker

    able = {row["backend"] for row in page.collect()["backends"] if row["reason"] is None}
    with progress_bar("verify") as progress:
        rows = checker.run(
            backends=sorted(able - {"reference"}),
            small=True,
            dtypes=[torch.float32] if quick else None,
            progress=lambda done, total: progress("verify", done, total),
        )
    return {**checker.as_json(rows), "text": shown(lambda where: checker.show(rows, where))}


def _bench_for_demo():
    from .. import bench as benchmark
    from ..bench import report

    with progress_bar("bench") as progress:
        found = benchmark.run(quick=True, progress=progress)
    return {**json.loads(report.as_json(found)), "text": shown(lambda where: report.show(found, where))}
