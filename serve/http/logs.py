"""One JSON object a line on stderr, for requests and for everything else, and no user's text in it.

A text can hide in an exception's message, in a query string or in the representation of a task: so
only the type and the frames of an exception are written, and no message beyond its first line.
"""

import logging
import os
import traceback
from datetime import UTC, datetime
from typing import Any

import msgspec


class JsonFormatter(logging.Formatter):
    """A record as one JSON object; ``extra={"fields": {...}}`` takes the place of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a newline."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": os.getpid(),
        }
        message = record.getMessage()
        if message:
            line["message"] = message.splitlines()[0]  # asyncio adds a task's exception below
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1]:
            line["exception"] = _frames(record.exc_info[1])
        return msgspec.json.encode(line).decode()


def _frames(error: BaseException) -> list[str]:
    """Return an exception's type and frames, innermost last, then those of what caused it."""
    frames = [type(error).__name__]
    for frame in traceback.extract_tb(error.__traceback__):
        frames.append(f"{frame.filename}:{frame.lineno} in {frame.name}")
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return frames if cause is None else [*frames, "caused by", *_frames(cause)]


def config(level: str = "info") -> dict[str, Any]:
    """Return the configuration for ``logging.config.dictConfig``; uvicorn's log_config is None.

    Uvicorn's own access log is silenced, for it writes query strings.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "json",
                "stream": "ext://sys.stderr",
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "trainkit": {"level": level.upper()},
            "uvicorn": {"level": level.upper()},
            "uvicorn.access": {"level": "CRITICAL", "propagate": False},
        },
    }
