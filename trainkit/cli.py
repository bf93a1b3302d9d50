"""The ``trainkit`` command: options in, one worker called, its report printed.

Workers are imported inside the commands, so that ``--help`` needs click alone. Exit codes: 0 done,
1 a check failed, 2 wrong usage or bad input.
"""

import click

from trainkit import __version__
from trainkit.commands.benching import bench
from trainkit.commands.data import data
from trainkit.commands.exporting import export, inspect, verify
from trainkit.commands.optimizing import optimize
from trainkit.commands.predicting import predict
from trainkit.commands.serving import serve
from trainkit.commands.training import evaluate, train
from trainkit.commands.tuning import tune
from trainkit.one_sentence import OneSentence

__all__ = ["cli", "main"]


class Trainkit(OneSentence, click.Group):
    """The commands."""


@click.group(cls=Trainkit, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trainkit")
def cli() -> None:
    """Train a small text classifier, export it with proof, serve it without torch.

    \b
    trainkit train --data sample --model prefix --backbone minilm
    trainkit export --format onnx
    trainkit predict runs/latest/onnx "How far is Mars?"
    """


for command in (
    data,
    train,
    tune,
    evaluate,
    export,
    optimize,
    verify,
    inspect,
    predict,
    serve,
    bench,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    cli()
