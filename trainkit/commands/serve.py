"""``trainkit serve``."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.serve.errors import InputError
from trainkit.serve.http import auth

if TYPE_CHECKING:
    import socket

__all__ = ["serve"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Port = click.IntRange(0, 65535)
Count = click.IntRange(min=1)


class Grouped(click.Command):
    """A command whose help lists its options in groups."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and isinstance(parameter, click.Option):
                group = getattr(parameter, "group", "Other")
                groups.setdefault(group, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class GroupedOption(click.Option):
    """An option that knows its group."""

    def __init__(self, *arguments: Any, group: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


def option(group: str, *names: str, **settings: Any) -> Callable[[Any], Any]:
    """Declare one option of a group, its default shown."""
    settings.setdefault("show_default", settings.get("default") is not None)
    return click.option(*names, cls=GroupedOption, group=group, **settings)


@click.command(cls=Grouped)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@option(
    "Address",
    "--host",
    metavar="HOST",
    default="127.0.0.1",
    help="Address to listen on, such as ::1.",
)
@option(
    "Address",
    "--port",
    metavar="PORT",
    type=Port,
    default=8000,
    help="0: a free one, which is printed.",
)
@option("Address", "--admin", metavar="HOST:PORT", help="Also listen there for new versions.")
@option(
    "Address",
    "--token-file",
    type=click.Path(path_type=Path),
    help=f"Demand this bearer token (or that of the variable {auth.VARIABLE}).",
)
@option(
    "Processes", "--workers", metavar="N", type=Count, default=1, help="Fronts that share the port."
)
@option(
    "Processes",
    "--threads",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Of each model's session; 0: as the bundle says, else all cores but one, and both of two.",
)
@option(
    "Processes",
    "--provider",
    metavar="NAME",
    multiple=True,
    help="ONNX Runtime's; several in order.",
)
@option(
    "Batches",
    "--batch-tokens",
    metavar="TOKENS",
    type=Count,
    default=2048,
    help="Of a batch at most.",
)
@option(
    "Batches",
    "--max-wait-ms",
    metavar="MS",
    type=click.FloatRange(0, 10_000),
    default=0.0,
    help="That an idle model waits for a batch to fill.",
)
@option(
    "Batches",
    "--queue-tokens",
    metavar="TOKENS",
    type=Count,
    default=1 << 18,
    help="That may wait, else 429.",
)
@option(
    "Batches",
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    help="For a request; fewer where it names a deadline. Then 504.",
)
@option(
    "Limits of a request",
    "--max-body",
    metavar="BYTES",
    type=Count,
    default=8 << 20,
    help="Of its body, also decompressed.",
)
@option("Limits of a request", "--max-texts", metavar="N", type=Count, default=1024, help="Texts.")
@option(
    "Limits of a request",
    "--max-characters",
    metavar="N",
    type=Count,
    default=1 << 20,
    help="Of all its texts together.",
)
@option(
    "Limits of a request",
    "--max-tokens",
    metavar="N",
    type=Count,
    default=1 << 17,
    help="Of all its texts together, after truncation.",
)
@option(
    "The end",
    "--drain-seconds",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    default=1.0,
    help="Served on after SIGTERM, not ready any more.",
)
@option(
    "The end",
    "--grace-seconds",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    default=30.0,
    help="Then, at most, for what is in flight.",
)
@option(
    "What is seen",
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="Of the JSON lines on standard error; info: one a request.",
)
@option("What is seen", "--otel", is_flag=True, help="OpenTelemetry spans, set up by OTEL_*.")
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    admin: str | None,
    token_file: Path | None,
    workers: int,
    drain_seconds: float,
    grace_seconds: float,
    log_level: str,
    otel: bool,
    **settings: Any,
) -> None:
    """Answer requests over HTTP: each BUNDLE is a FOLDER, or NAME=FOLDER to name its model.

    Once every model runs, a line with the address is printed. SIGTERM ends it without losing a
    request, SIGHUP loads every bundle anew. docs/serving.md tells the routes.

    \b
    trainkit serve runs/latest/onnx
    trainkit serve topics=runs/topics/onnx mood=runs/mood/onnx --port 9000 --workers 2
    """
    folders = named(bundles)
    admin_address = None if admin is None else host_and_port(admin)
    token = read_token(token_file)

    from trainkit.serve.http import run, supervisor
    from trainkit.serve.http.sockets import bound

    plan = run.WorkerConfig(
        folders=folders,
        settings=server_settings(**settings),
        token=token,
        drain_s=drain_seconds,
        grace_s=grace_seconds,
        log_level=log_level,
        otel=otel,
    )
    with bound(host, port) as listener:
        check_exposure(listener, token)
        if admin_address is None:
            status = start(run, supervisor, plan, workers, listener, None)
        else:
            with bound(*admin_address) as admin_listener:
                check_admin(admin_listener, token)
                status = start(run, supervisor, plan, workers, listener, admin_listener)
    sys.exit(status)


def start(run: Any, supervisor: Any, plan: Any, workers: int, *listeners: Any) -> int:
    """Serve in this process, or in several."""
    if workers == 1:
        return int(run.run(plan, *listeners))
    return int(supervisor.run(plan, workers, *listeners))


def named(bundles: Sequence[str]) -> dict[str, str]:
    """Return the folder of each model; ``InputError`` where two have one name, or a bad one."""
    folders: dict[str, str] = {}
    for given in bundles:
        name, equals, folder = given.partition("=")
        if not equals or "/" in name:  # a path may hold an equals sign
            # Of the path as given: of a link, its own name and not the target's.
            name, folder = Path(os.path.abspath(given)).name, given  # noqa: PTH100
        if not NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is no name for a model: letters, digits, '.', '_' and '-', 100 at most; "
                "name it: NAME=FOLDER"
            )
        if not folder:
            raise InputError(f"{given!r} names no folder; write NAME=FOLDER.")
        if name in folders:
            raise InputError(
                f"{folders[name]} and {folder} would both be named {name!r}; "
                "name them: NAME=FOLDER NAME=FOLDER"
            )
        folders[name] = folder
    return folders


def server_settings(**given: Any) -> Any:
    """Build the settings; ``InputError`` where they contradict each other."""
    from trainkit.serve.http.settings import Limits, Settings

    if given["max_tokens"] > given["queue_tokens"]:
        raise InputError(
            f"--max-tokens {given['max_tokens']} is more than --queue-tokens "
            f"{given['queue_tokens']}: such a request could never wait; lower the first or "
            "raise the second."
        )
    return Settings(
        limits=Limits(
            body_bytes=given["max_body"],
            texts=given["max_texts"],
            characters=given["max_characters"],
            tokens=given["max_tokens"],
        ),
        batch_tokens=given["batch_tokens"],
        max_wait_ms=given["max_wait_ms"],
        queue_tokens=given["queue_tokens"],
        timeout_s=given["timeout"],
        threads=given["threads"],
        providers=given["provider"],
    )


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT, where an IPv6 host stands in brackets."""
    found = re.fullmatch(r"(\[.+\]|[^:\[\]]+):([0-9]{1,5})", address)
    if found is None or int(found[2]) > 65535:
        raise InputError(
            f"--admin {address!r} is not HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001."
        )
    return found[1], int(found[2])


def read_token(file: Path | None) -> str | None:
    """Return the token of the file or of the environment, which then no child inherits."""
    token = auth.from_environment()
    if file is None:
        return token
    try:
        token = auth.checked(file.read_text(encoding="utf-8").strip(), str(file))
        readable = file.stat().st_mode & 0o044
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(
            f"the token file {file} cannot be read ({reason}); check the path."
        ) from None
    if readable:
        warn(f"other users can read {file}, which holds the token; run: chmod 600 {file}")
    return token


def check_exposure(listener: "socket.socket", token: str | None) -> None:
    """Warn where everybody on the network may ask."""
    from trainkit.serve.http.sockets import is_loopback, url

    if token is None and not is_loopback(listener):
        warn(
            f"whoever reaches {url(listener)} can use it; set a token, or put it behind a proxy "
            "that asks for one"
        )


def check_admin(listener: "socket.socket", token: str | None) -> None:
    """Refuse an admin address that everybody on the network may use."""
    from trainkit.serve.http.sockets import is_loopback

    if token is None and not is_loopback(listener):
        raise InputError(
            "--admin on an address that other machines reach needs a token: set --token-file, or "
            "use 127.0.0.1."
        )


def warn(sentence: str) -> None:
    """Print one line on standard error."""
    click.echo(f"Warning: {sentence}.", err=True)
