"""Errors at the end of a command: one sentence on standard error, and an exit code."""

import errno
from typing import Any

import click

from trainkit.serve.errors import InputError, TrainkitError, first_line

UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h

# What `pip install trainkit-onnx[...]` brings each library that the base install leaves out.
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
    "optuna": "tune",
    "psutil": "bench",
    "ray": "ray",
    "starlette": "serve",
    "tensorboard": "tensorboard",
    "tomli_w": "train",
    "uvicorn": "serve",
    "yarl": "bench",
}


class CommandError(click.ClickException):
    """One sentence on standard error, and the exit code that its kind of error has."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares a class variable


class ErrorReportingCommand(click.Command):
    """A command that turns our own errors, and a missing extra, into one clear sentence."""

    def check(self, context: click.Context) -> None:
        """Raise InputError if the options of a subclass are out of range."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            self.check(context)
            return super().invoke(context)
        except TrainkitError as error:
            raise CommandError(str(error), error.exit_code) from None
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            message = f"this command needs {error.name}; run: pip install 'trainkit-onnx[{extra}]'"
            raise CommandError(message, InputError.exit_code) from None


class CommandLine(ErrorReportingCommand, click.Group):
    """All commands; an unexpected error becomes a sentence that asks for a report."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command; with ``--debug`` such an error keeps its traceback."""
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if context.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            kind, sentence = type(error).__name__, first_line(error)
            raise CommandError(
                f"trainkit itself failed ({kind}: {sentence}); please report it with the output of "
                "the same command after: trainkit --debug",
                UNFORESEEN,
            ) from error
