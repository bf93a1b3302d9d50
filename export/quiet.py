"""Exporters without their chatter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

# torch.onnx notes that torchvision is missing; transformers, that a loss is not configured, when
# the tracer reads every property of the model; onnxscript, each constant that it does not fold.
LOGGERS = ("torch.onnx", "onnxscript", "transformers")


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep progress lines, notes and tracer warnings off the user's screen.

    The tracer warns at every Python number that it meets, PyTorch that TorchScript is deprecated.
    Errors are raised all the same, and the parity matrix judges what comes out: whether a number
    was baked in shows there.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
