"""The two errors a user meets: their input is wrong (exit 2), or a check failed (exit 1)."""

from typing import ClassVar

__all__ = ["CheckFailedError", "InputError", "TrainkitError"]


class TrainkitError(Exception):
    """An error with one clear sentence for the user; the command line prints it, no traceback."""

    exit_code: ClassVar[int] = 1


class InputError(TrainkitError):
    """The input is wrong: the sentence says what, where, what was expected and what to do."""

    exit_code = 2


class CheckFailedError(TrainkitError):
    """The work was done, and a check of it failed: parity, an accuracy gate, a regression."""

    exit_code = 1
