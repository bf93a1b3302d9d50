"""The ``trainkit`` command.

Each command checks its options, calls one function of the Python API and prints its report. What
computes is imported inside the commands, so that ``--help`` loads neither numpy nor torch. Exit
codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 70 an error in trainkit itself.
"""

import click

from trainkit import __version__
from trainkit.cli_errors import CommandLine
from trainkit.commands.bench import bench
from trainkit.commands.data import data
from trainkit.commands.env import env
from trainkit.commands.evaluate import evaluate
from trainkit.commands.export import export
from trainkit.commands.inspect import inspect
from trainkit.commands.optimize import optimize
from trainkit.commands.predict import predict
from trainkit.commands.serve import serve
from trainkit.commands.train import train
from trainkit.commands.tune import tune
from trainkit.commands.verify import verify


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trainkit", help="Show the version and exit.")
@click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
def cli(debug: bool) -> None:
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
    env,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    cli()
