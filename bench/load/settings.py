"""Settings of ``trainkit bench load``: the default, the bounds and the help of every option."""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from trainkit.serve.errors import InputError
from trainkit.serve.fields import faults

Arrivals: TypeAlias = Literal["poisson", "constant"]
Protocol: TypeAlias = Literal["classify", "v2"]

LOAD, SEARCH = "Load", "Search"


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to load a server. A run ends after ``duration_s`` or ``max_requests``."""

    protocol: Annotated[
        Protocol,
        Meta(
            description='Protocol of the requests; classify: {"texts": [...]}, v2: Open Inference '
            "Protocol.",
            extra={"group": LOAD},
        ),
    ] = "classify"
    arrivals: Annotated[
        Arrivals, Meta(description="Process by which requests become due.", extra={"group": LOAD})
    ] = "poisson"
    rate: Annotated[
        float,
        Meta(
            gt=0,
            description="Requests per second; a search begins with it.",
            extra={"group": LOAD},
        ),
    ] = 50.0
    duration_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds that each rate is measured.",
            extra={"group": LOAD, "option": "--duration", "metavar": "SECONDS"},
        ),
    ] = 10.0
    warm_up_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Seconds of warm-up before each rate, which are not counted.",
            extra={"group": LOAD, "option": "--warm-up", "metavar": "SECONDS"},
        ),
    ] = 2.0
    max_requests: Annotated[
        int, Meta(ge=1, description="Maximum requests at each rate.", extra={"group": LOAD})
    ] = 100_000
    timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds from when a request was due until it counts as timed out.",
            extra={"group": LOAD, "option": "--timeout", "metavar": "SECONDS"},
        ),
    ] = 10.0
    connections: Annotated[
        int, Meta(ge=1, description="Maximum open connections.", extra={"group": LOAD})
    ] = 256
    texts_per_request: Annotated[
        int, Meta(ge=1, description="Texts in each request.", extra={"group": LOAD})
    ] = 1
    seed: Annotated[
        int, Meta(ge=0, description="Seed of the Poisson arrivals.", extra={"group": LOAD})
    ] = 0
    p99_below_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Limit of the p99 latency for --find-rate, in milliseconds.",
            extra={"group": SEARCH, "option": "--p99-below", "metavar": "MS"},
        ),
    ] = None
    max_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="Time limit of a --find-rate search, in seconds.",
            extra={"group": SEARCH},
        ),
    ] = 300.0

    def __post_init__(self) -> None:
        from trainkit.bench.measure.statistics import MIN_SAMPLES

        found = list(faults(self))
        if self.p99_below_ms is not None and self.max_requests < MIN_SAMPLES[99]:
            found.append(f"a p99 takes max_requests of {MIN_SAMPLES[99]} at least")
        if found:
            raise InputError("These load settings do not work: " + "; ".join(found) + ".")
