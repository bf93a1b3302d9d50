"""``trainkit serve``."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.options import command, options_of
from trainkit.serve.errors import InputError
from trainkit.serve.http import auth
from trainkit.serve.http.settings import Limits, ServerSettings, Settings

if TYPE_CHECKING:
    import socket

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@options_of(ServerSettings)
@options_of(Settings, without=["limits"])
@options_of(Limits)
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    admin: str | None,
    token_file: str | None,
    workers: int,
    drain_s: float,
    grace_s: float,
    log_level: str,
    otel: bool,
    **settings: Any,
) -> None:
    """Answer requests over HTTP: each BUNDLE is a FOLDER, or NAME=FOLDER to name its model.

    Once every model runs, a line with the address is printed. SIGTERM ends the server without
    losing a request, SIGHUP loads every bundle again. docs/serving.md describes the routes.

    \b
    trainkit serve runs/latest/onnx
    trainkit serve topics=runs/topics/onnx mood=runs/mood/onnx --port 9000 --workers 2
    """
    folders = named(bundles)
    admin_address = None if admin is None else host_and_port(admin)
    token = read_token(None if token_file is None else Path(token_file))

    from trainkit.serve.http import run, supervisor
    from trainkit.serve.http.sockets import bound

    plan = run.WorkerConfig(
        folders=folders,
        settings=server_settings(**settings),
        token=token,
        drain_s=drain_s,
        grace_s=grace_s,
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
    """Return the folder of each model; InputError if a name is invalid or used twice."""
    folders: dict[str, str] = {}
    for given in bundles:
        name, equals, folder = given.partition("=")
        if not equals or "/" in name:  # a path may hold an equals sign
            # Of the path as given: of a link, its own name and not the target's.
            name, folder = Path(os.path.abspath(given)).name, given  # noqa: PTH100
        if not NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is not a valid model name: letters, digits, '.', '_' and '-', 100 at "
                "most; name it: NAME=FOLDER"
            )
        if not folder:
            raise InputError(f"{given!r} has no folder; write NAME=FOLDER.")
        if name in folders:
            raise InputError(
                f"{folders[name]} and {folder} would both be named {name!r}; "
                "name them: NAME=FOLDER NAME=FOLDER"
            )
        folders[name] = folder
    return folders


def server_settings(**given: Any) -> Settings:
    """Build the settings; InputError if they contradict each other."""
    limits = Limits(**{name: given[name] for name in Limits.__struct_fields__})
    if limits.tokens > given["queue_tokens"]:
        raise InputError(
            f"--max-tokens {limits.tokens} is more than --queue-tokens {given['queue_tokens']}: "
            "such a request could never wait; lower the first or raise the second."
        )
    own = {name: given[name] for name in Settings.__struct_fields__ if name in given}
    return Settings(limits=limits, **own)


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 host is in brackets."""
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
    """Warn if every machine on the network can send requests."""
    from trainkit.serve.http.sockets import is_loopback, url

    if token is None and not is_loopback(listener):
        warn(
            f"anyone who reaches {url(listener)} can use it; set a token, or put it behind a proxy "
            "that asks for one"
        )


def check_admin(listener: "socket.socket", token: str | None) -> None:
    """Refuse an admin address that every machine on the network can use."""
    from trainkit.serve.http.sockets import is_loopback

    if token is None and not is_loopback(listener):
        raise InputError(
            "--admin on an address that other machines reach needs a token: set --token-file, or "
            "use 127.0.0.1."
        )


def warn(sentence: str) -> None:
    """Print one line on standard error."""
    click.echo(f"Warning: {sentence}.", err=True)
