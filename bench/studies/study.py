"""The frame of all studies: measure, write JSON, print Markdown, check against the goals."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import click
import msgspec

from trainkit.bench import files
from trainkit.bench.files import ReportHead
from trainkit.bench.measure.environment import cpu_steal_monitor, describe
from trainkit.bench.result import Result
from trainkit.bench.studies.quiet_machine import wait_until_quiet
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps

RESULTS = Path("bench/results")
T = TypeVar("T", bound=ReportHead)
OPTIONS = (
    click.Option(["--quiet-minutes"], default=0.0, help="Minutes to wait for a quiet machine."),
    click.Option(["--out"], type=click.Path(path_type=Path), help="[default: in bench/results]"),
)


@dataclass(frozen=True)
class Session:
    """A running study: call it to report a step."""

    on_progress: Callable[[str], None]
    quiet_minutes: float

    def __call__(self, step: str) -> None:
        """Report a step."""
        self.on_progress(step)

    def wait_until_quiet(self) -> None:
        """Wait for a quiet machine, as long as the option says."""
        wait_until_quiet(60 * self.quiet_minutes, self.on_progress)


@dataclass(frozen=True)
class Study(Generic[T]):
    """One study.

    ``measure`` takes a :class:`Session` and its click options. ``check`` raises
    ``CheckFailedError`` if a goal is missed. ``file`` returns the stem of the result's file from
    the options; by default it is ``name``. ``blocks`` are other texts of the documents made from
    the same file.
    """

    name: str
    kind: type[T]
    measure: Callable[..., T]
    markdown: Callable[[T], str]
    check: Callable[[T], None] = lambda result: None
    file: Callable[[dict[str, Any]], str] | None = None

    @property
    def command(self) -> click.Command:
        """Return the study's command."""
        own = reversed(getattr(self.measure, "__click_params__", []))
        return ErrorReportingCommand(
            self.name, callback=self.run, params=[*own, *OPTIONS], help=self.measure.__doc__
        )

    def run(self, quiet_minutes: float, out: Path | None, **options: Any) -> None:
        """Measure, write the result, print it and check it."""
        with steps() as on_progress:
            session = Session(on_progress, quiet_minutes)
            session.wait_until_quiet()
            steal = cpu_steal_monitor()
            result = self.measure(session, **options)
        reasons = () if isinstance(result, Result) else steal()  # a race watches that itself
        if reasons:
            noisy_because = (*result.noisy_because, *reasons)
            result = msgspec.structs.replace(result, noisy=True, noisy_because=noisy_because)
        stem = self.file(options) if self.file else self.name
        files.write(out or RESULTS / f"{stem}.json", files.json_lines(result))
        click.echo(self.markdown(result))
        self.check(result)

    def load(self, path: Path) -> T:
        """Read a result."""
        return files.read(path, self.kind, f"python -m trainkit.bench.studies {self.name}")


def command_line() -> tuple[str, ...]:
    """Return the command, with only the last part of each path, so that it can be published."""
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return ("python", "-m", "trainkit.bench.studies", *words)


def head() -> dict[str, Any]:
    """Return the fields that every result begins with."""
    now = datetime.now(UTC).replace(microsecond=0)
    return {"command": command_line(), "date": now, "environment": describe()}
