"""``info``."""

import click

from .common import console, json_option, write_json


@click.command()
@json_option
def info(json_path):
    """What was built, what this machine has, and which backend can run."""
    from .. import info as page

    found = page.collect()
    page.show(found, console)
    write_json(json_path, found)
