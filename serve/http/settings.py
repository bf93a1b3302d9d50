"""Settings of ``trainkit serve``: the default, the bounds and the help text of every option.

The command line makes its options from these structs. ``extra`` of a field's metadata names the
group of its option in the help and the option's name if it is not the field's; a field with
``extra["hidden"]`` has no option.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

ADDRESS, PROCESSES, BATCHES = "Address", "Processes", "Batching"
SHUTDOWN, LOGGING = "Shutdown", "Logging"


def _setting(description: str, group: str, option: str = "", **bounds: Any) -> Meta:
    return Meta(description=description, extra={"group": group, "option": option}, **bounds)


def _limit(option: str, description: str) -> Meta:
    return _setting(description, "Limits of a request", option, ge=1)


def _hidden(description: str, **bounds: Any) -> Meta:
    return Meta(description=description, extra={"hidden": "yes"}, **bounds)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one request, checked before the request is read, tokenized or run."""

    body_bytes: Annotated[int, _limit("--max-body", "Maximum bytes, sent and decompressed.")] = (
        8 << 20
    )
    texts: Annotated[int, _limit("--max-texts", "Maximum number of texts.")] = 1024
    characters: Annotated[
        int, _limit("--max-characters", "Maximum number of characters of all texts.")
    ] = 1 << 20
    tokens: Annotated[
        int, _limit("--max-tokens", "Maximum number of tokens of all texts, after truncation.")
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
        int, _setting("Maximum tokens per batch; a longer text runs alone.", BATCHES, ge=1)
    ] = 2048
    max_wait_ms: Annotated[
        float,
        _setting("Milliseconds that an idle model waits for more.", BATCHES, ge=0, le=10_000),
    ] = 0.0
    queue_tokens: Annotated[
        int, _setting("Maximum queued tokens per model; beyond it, status 429.", BATCHES, ge=1)
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
    batch_rows: Annotated[int, _hidden("Maximum texts per batch.", ge=1)] = 64
    max_threads: Annotated[int, _hidden("Maximum default of threads. 0: all cores.", ge=0)] = 0
    hang_s: Annotated[float, _hidden("Seconds until a batch's process is killed.", gt=0)] = 30.0
    start_s: Annotated[float, _hidden("Seconds for a model to load.", gt=0)] = 120.0
    ping_s: Annotated[float, _hidden("Seconds between a process's heartbeats.", gt=0)] = 0.2
    silent_s: Annotated[float, _hidden("Seconds without one: not ready.", gt=0)] = 0.6
    kill_s: Annotated[float, _hidden("Seconds without one: killed.", gt=0)] = 2.0


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server listens, in how many processes, how it ends and what it logs."""

    host: Annotated[str, _setting("Address to listen on, such as 0.0.0.0 or ::1.", ADDRESS)] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, _setting("Port. 0: a free port, which is printed.", ADDRESS, ge=0, le=65535)
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
        int, _setting("HTTP worker processes; each loads every model.", PROCESSES, ge=1)
    ] = 1
    drain_s: Annotated[
        float,
        _setting(
            "Seconds after SIGTERM in which requests are still accepted; readiness is false.",
            SHUTDOWN,
            "--drain-seconds",
            ge=0,
            le=3600,
        ),
    ] = 1.0
    grace_s: Annotated[
        float,
        _setting(
            "Seconds after that for requests in progress.",
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
        bool, _setting("Export OpenTelemetry traces, configured by OTEL_* variables.", LOGGING)
    ] = False
