"""Loading with transformers and PEFT: quiet, and with one sentence for any error they raise."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from trainkit.serve.errors import InputError, TrainkitError, first_line


@contextmanager
def as_input_error(what: str, remedy: str) -> Iterator[None]:
    """Turn any error raised on a user's files into an ``InputError``: what, the reason, a remedy.

    Invalid files raise anything from ``KeyError`` to ``SafetensorError``.
    """
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of PEFT's warnings is checked explicitly
            yield
    except TrainkitError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({first_line(error)}); {remedy}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and its report of unused weights."""
    verbosity = transformers_logging.get_verbosity()
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def reset_outputs(config: Any) -> None:
    """Have a model answer with an output object and nothing beside it; its logits are the same.

    A saved ``config.json`` may ask for tuples, attentions or hidden states.
    """
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False
    vars(config).pop("torchscript", None)
