"""``verify``."""

import sys

import click

from .. import backends as registry
from .. import functional
from .common import console, json_option, names_option, progress_bar, write_json


@click.command()
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

    from .. import verify as checker

    unknown = [name for name in backend if name not in registry.names()]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(registry.names())}", param_hint="--backend")
    with progress_bar("verify") as progress:
        rows = checker.run(
            list(operation) or None,
            list(backend) or None,
            seed=seed,
            small=small,
            dtypes=[getattr(torch, name) for name in dtype] or None,
            progress=lambda done, total: progress("verify", done, total),
        )
    checker.show(rows, console)
    write_json(json_path, checker.as_json(rows))
    if not checker.passed(rows):
        sys.exit(1)
