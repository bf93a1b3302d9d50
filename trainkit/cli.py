"""The ``trainkit`` command: options in, one worker called, its report printed.

Workers are imported inside the commands, so that ``--help`` needs click alone. Exit codes: 0 done,
1 a check failed, 2 wrong usage or bad input.
"""

from typing import Any

import click

from trainkit import __version__
from trainkit.commands.benching import bench
from trainkit.commands.data import data
from trainkit.commands.exporting import export, inspect, verify
from trainkit.commands.optimizing import optimize
from trainkit.commands.predicting import predict
from trainkit.commands.serving import serve
from trainkit.commands.training import evaluate, train
from trainkit.serve.errors import InputError, TrainkitError

__all__ = ["cli", "main"]

# What `pip install trainkit[...]` brings each library that the base install leaves out.
EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "aiohttp": "bench",
    "matplotlib": "train",
    "opentelemetry": "otel",
    "prometheus_client": "serve",
    "psutil": "bench",
    "ray": "ray",
    "starlette": "serve",
    "uvicorn": "serve",
    "yarl": "bench",
}


class Failure(click.ClickException):
    """One sentence on standard error, and the exit code that its kind of error has."""

    def __init__(self, error: TrainkitError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares a class variable


class Trainkit(click.Group):
    """A group that turns our own errors, and a missing extra, into one clear sentence."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except TrainkitError as error:
            raise Failure(error) from None
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            message = f"this command needs {error.name}; run: pip install 'trainkit[{extra}]'"
            raise Failure(InputError(message)) from None


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
