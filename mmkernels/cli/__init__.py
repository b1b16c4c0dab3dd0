"""The command line, a file a command. Each only shows what a function of the package returns."""

import click

from .. import __version__
from .bench import bench
from .compare import compare
from .demo import demo
from .evaluate import evaluate
from .info import info
from .limits import limits
from .patch import patch
from .predict import predict
from .train import train
from .verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmkernels")
def main():
    """Fused score -> softmax -> multiply kernels for image and text features."""


for command in (info, verify, bench, patch, demo, train, evaluate, predict, compare, limits):
    main.add_command(command)
