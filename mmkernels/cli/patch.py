"""``patch``."""

import dataclasses
import functools
import importlib
import sys
from pathlib import Path

import click

from .common import console, json_option, write_json


@click.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@json_option
def patch(factory, json_path):
    """What mmkernels.patch would replace in a model, and what not and why: a dry run.

    FACTORY is a function of MODULE, which is looked for in the current folder, too, and gives the model when it is
    called without arguments. Or it is the model.
    """
    from rich.table import Table

    from .. import integrations

    report = integrations.patch(_model(factory), dry_run=True)
    title, *_ = str(report).splitlines()
    table = Table("module", "class", "would be", "note", title=title)
    for row in report.rows:
        table.add_row(row.name or "(the model)", row.kind, row.operation or "-", row.reason)
    console.print(table if report.rows else title)
    write_json(json_path, {"title": title, "rows": [dataclasses.asdict(row) for row in report.rows]})


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
