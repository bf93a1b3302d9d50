"""Errors at the end of a command: one sentence on standard error, and an exit code."""

from typing import Any

import click

from trainkit.serve.errors import InputError, TrainkitError

__all__ = ["ErrorReportingCommand"]

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


class Failure(click.ClickException):
    """One sentence on standard error, and the exit code that its kind of error has."""

    def __init__(self, error: TrainkitError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares a class variable


class ErrorReportingCommand(click.Command):
    """A command that turns our own errors, and a missing extra, into one clear sentence."""

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
            message = f"this command needs {error.name}; run: pip install 'trainkit-onnx[{extra}]'"
            raise Failure(InputError(message)) from None
