"""The parent's end of a worker: start it, ask it, and be sure that it ends."""

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from trainkit.bench.engines.base import EngineUnavailableError
from trainkit.bench.race.protocol import EngineFailed, EngineUnavailable, Measured, Reply, Request
from trainkit.serve.errors import CheckFailedError, InputError

STOP_SECONDS = 5.0

Kind = TypeVar("Kind", bound=Reply)


class WorkerProcess:
    """One worker, as a context manager; ``name`` is what errors call it.

    Its standard error goes to the file ``log``: an unread pipe would fill up and block it.
    """

    def __init__(self, command: Sequence[str], name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self.peak_rss_bytes: int | None = None
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, request: Request, kind: type[Kind]) -> Kind:
        """Send a request and wait for its reply.

        The worker's own ``InputError``, ``CheckFailedError`` or ``EngineUnavailableError`` is
        raised here, and ``CheckFailedError`` if it died or wrote anything else on standard output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which readline shows next
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        try:
            reply = msgspec.json.decode(line, type=Reply)
        except (msgspec.DecodeError, UnicodeDecodeError):
            reply = None
        if isinstance(reply, EngineFailed):
            error = InputError if reply.exit_code == InputError.exit_code else CheckFailedError
            raise error(reply.message)
        if isinstance(reply, EngineUnavailable):
            raise EngineUnavailableError(reply.reason)
        if isinstance(reply, Measured):
            self.peak_rss_bytes = reply.peak_rss_bytes
        if not isinstance(reply, kind):
            raise CheckFailedError(
                f"the worker of {self.name} wrote {line[:60]!r} where a {kind.__name__} was "
                "expected; something in it prints past sys.stdout."
            )
        return reply

    def _death(self) -> CheckFailedError:
        status = self._process.wait()
        if status >= 0:
            how = f"exit status {status}"
        else:
            how = f"killed by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += ", for lack of memory perhaps"
        reason = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
        return CheckFailedError(f"the worker of {self.name} died ({how}): {reason}")

    def stop(self) -> None:
        """Close its standard input, which ends it; kill it if it has not ended soon after."""
        try:
            self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def last_line(text: str) -> str:
    """Return the last line that is not blank: of a traceback, the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message on standard error"
