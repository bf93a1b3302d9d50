"""Settings of ``trainkit serve``: the default, the bounds and the help text of every option.

The command line makes its options from these structs. ``extra`` of a field's metadata names the
group of its option in the help and the option's name if it is not the field's; a field with
``extra["hidden"]`` has no option.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


def _setting(description: str, group: str = "", option: str = "", **bounds: Any) -> Meta:
    extra = {"group": group, "option": option}
    if not group:
        extra = {"hidden": "yes"}
    return Meta(description=description, extra=extra, **bounds)


REQUEST, BATCHES, PROCESSES = "Limits of a request", "Batching", "Processes"
ADDRESS, SHUTDOWN, LOGGING = "Address", "Shutdown", "Logging"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one request, checked before the request is read, tokenized or run."""

    body_bytes: Annotated[
        int,
        _setting(
            "Maximum size of a request body in bytes, as sent and once decompressed.",
            REQUEST,
            "--max-body",
            ge=1,
        ),
    ] = 8 << 20
    texts: Annotated[
        int, _setting("Maximum number of texts per request.", REQUEST, "--max-texts", ge=1)
    ] = 1024
    characters: Annotated[
        int,
        _setting(
            "Maximum number of characters of all texts of a request.",
            REQUEST,
            "--max-characters",
            ge=1,
        ),
    ] = 1 << 20
    tokens: Annotated[
        int,
        _setting(
            "Maximum number of tokens of all texts of a request, special tokens included, after "
            "truncation.",
            REQUEST,
            "--max-tokens",
            ge=1,
        ),
    ] = 1 << 17


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests are limited, batched and run."""

    limits: Limits = Limits()
    threads: Annotated[
        int,
        _setting(
            "Intra-op threads per model. 0: the bundle's setting, else one fewer than the cores "
            "(both cores of a two-core machine).",
            PROCESSES,
            ge=0,
        ),
    ] = 0
    providers: Annotated[
        tuple[str, ...],
        _setting(
            "ONNX Runtime execution provider; repeat it in order of preference. Default: the "
            "bundle's setting, else CPUExecutionProvider.",
            PROCESSES,
            "--provider",
        ),
    ] = ()
    batch_tokens: Annotated[
        int,
        _setting("Maximum number of tokens per batch; a longer text runs alone.", BATCHES, ge=1),
    ] = 2048
    max_wait_ms: Annotated[
        float,
        _setting(
            "Milliseconds that an idle model waits for a batch to fill. 0: it never waits.",
            BATCHES,
            ge=0,
            le=10_000,
        ),
    ] = 0.0
    queue_tokens: Annotated[
        int,
        _setting(
            "Maximum number of queued tokens per model; beyond it requests get status 429.",
            BATCHES,
            ge=1,
        ),
    ] = 1 << 18
    timeout_s: Annotated[
        float,
        _setting(
            "Seconds until a queued request gets status 504; requests may ask for less.",
            BATCHES,
            "--timeout",
            gt=0,
        ),
    ] = 30.0
    batch_rows: Annotated[int, _setting("Maximum number of texts per batch.", ge=1)] = 64
    max_threads: Annotated[
        int, _setting("Maximum of the default of threads. 0: the number of usable cores.", ge=0)
    ] = 0
    hang_s: Annotated[
        float, _setting("Seconds after which a batch's model process is killed.", gt=0)
    ] = 30.0
    start_s: Annotated[float, _setting("Seconds within which a model must have loaded.", gt=0)] = (
        120.0
    )
    ping_s: Annotated[
        float, _setting("Seconds between two heartbeats of a model process.", gt=0)
    ] = 0.2
    silent_s: Annotated[
        float, _setting("Seconds without a heartbeat until a model is not ready.", gt=0)
    ] = 0.6
    kill_s: Annotated[
        float, _setting("Seconds without a heartbeat until a model process is killed.", gt=0)
    ] = 2.0


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server listens, in how many processes, how it ends and what it logs."""

    host: Annotated[str, _setting("Address to listen on, such as 0.0.0.0 or ::1.", ADDRESS)] = (
        "127.0.0.1"
    )
    port: Annotated[
        int,
        _setting("Port to listen on. 0: a free port, which is printed.", ADDRESS, ge=0, le=65535),
    ] = 8000
    admin: Annotated[
        str | None,
        _setting("HOST:PORT of the admin routes, which load new model versions.", ADDRESS),
    ] = None
    token_file: Annotated[
        str | None,
        _setting(
            "File with the bearer token that requests must carry. Default: the environment "
            "variable TRAINKIT_TOKEN, else no token.",
            ADDRESS,
        ),
    ] = None
    workers: Annotated[
        int, _setting("Number of HTTP worker processes; each loads every model.", PROCESSES, ge=1)
    ] = 1
    drain_s: Annotated[
        float,
        _setting(
            "Seconds after SIGTERM during which requests are still accepted while the server "
            "reports that it is not ready.",
            SHUTDOWN,
            "--drain-seconds",
            ge=0,
            le=3600,
        ),
    ] = 1.0
    grace_s: Annotated[
        float,
        _setting(
            "Seconds that requests in progress have to finish after that.",
            SHUTDOWN,
            "--grace-seconds",
            ge=0,
            le=3600,
        ),
    ] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _setting("Level of the JSON log on standard error; info logs each request.", LOGGING),
    ] = "info"
    otel: Annotated[
        bool,
        _setting(
            "Export OpenTelemetry traces, configured by the OTEL_* environment variables.", LOGGING
        ),
    ] = False
