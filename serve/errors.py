"""The two errors a user meets: their input is wrong (exit 2), or a check failed (exit 1)."""

from typing import ClassVar


class TrainkitError(Exception):
    """An error with one clear sentence for the user; the command line prints it, no traceback."""

    exit_code: ClassVar[int] = 1


class InputError(TrainkitError):
    """The input is wrong: the sentence says what, where, what was expected and what to do."""

    exit_code = 2


class CheckFailedError(TrainkitError):
    """The work was done, and a check of it failed: parity, an accuracy gate, a regression."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message without its full stop, or the error's name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
