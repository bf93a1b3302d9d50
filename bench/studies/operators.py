"""Where a forward's time goes, operator by operator, by ONNX Runtime's own profiler.

Only shares are kept: the profiler adds some microseconds to each operator.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import click
import msgspec
import onnxruntime as ort

from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.studies.study import Session, Study, head
from trainkit.data.columns import Columns
from trainkit.data.splits import load_split
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.cores import usable_cores
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError
from trainkit.serve.forward_pool import split_batches
from trainkit.serve.onnx_session import onnx_runner
from trainkit.tables import Table

PASSES = 5  # of which the first is left out
SHOWN = 0.01  # the least share of time that has a row of its own


class Shares(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the events of a profile come to.

    ``shares`` of the time within operators, which add up to 1, by their names; ``calls`` of each in
    one forward. ``inside`` is the share of a forward's time that is within operators at all.
    """

    forwards: int
    inside: float
    shares: dict[str, float]
    calls: dict[str, float]


class Profile(Shares, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bundle on batches of one size."""

    precision: str
    data: str
    batch_size: int


class Operators(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The profiles of some bundles on some data."""

    schema: Literal["trainkit-operators/2"] = "trainkit-operators/2"
    profiles: tuple[Profile, ...]


class Event(msgspec.Struct):
    """One line of ONNX Runtime's profile; ``ts`` and ``dur`` in microseconds."""

    name: str = ""
    ts: int = 0
    dur: int = 0
    args: Mapping[str, object] = msgspec.field(default_factory=dict)


@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--data", multiple=True, required=True)
@click.option("--texts", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=click.IntRange(min=1), default=[1, 32]
)
def measure(
    session: Session,
    bundles: tuple[Path, ...],
    data: tuple[str, ...],
    texts: int,
    batch_sizes: tuple[int, ...],
) -> Operators:
    """Profile BUNDLES on the first test texts of each data set, in batches as serving cuts them."""
    profiles = []
    for source in data:
        examples, name = load_split(source, Columns())[:texts], Path(source).name
        for bundle in map(open_bundle, bundles):
            for size in batch_sizes:
                session(f"{bundle.folder}: {name}, batches of {size}")
                batches = _batches(bundle, [one.text for one in examples], size)
                profiles.append(profile(bundle, batches, name, size))
    return Operators(**head(), profiles=tuple(profiles))


def _batches(bundle: BundleFiles, texts: Sequence[str], size: int) -> list[Batch]:
    encoder = bundle.encoder()
    return [encoder.encode(texts[start : start + size]) for start in range(0, len(texts), size)]


def profile(bundle: BundleFiles, batches: Iterable[Batch], data: str, batch_size: int) -> Profile:
    """Profile ``batches`` in an ONNX bundle; raises ``InputError`` for another format.

    One thread a core, and nothing else should run: an operator that waits is counted as busy.
    """
    if bundle.manifest.format != "onnx":
        raise InputError(f"{bundle.folder} is {bundle.manifest.format}; give an ONNX bundle.")
    given = list(batches)
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        run = onnx_runner(bundle.model_path, threads=usable_cores(), options=options)
        cut = run if bundle.manifest.equal_lengths else split_batches(run)
        for _ in range(PASSES):
            for batch in given:
                cut(batch)
        del run, cut  # the file is written when the session ends
        (written,) = Path(folder).iterdir()
        events = msgspec.json.decode(written.read_bytes(), type=list[Event])
    return Profile(
        **msgspec.structs.asdict(shares(events)),
        precision=bundle.manifest.precision,
        data=data,
        batch_size=batch_size,
    )


def shares(events: Sequence[Event]) -> Shares:
    """Add up a profile's events, but for those of its first pass."""
    forwards = [event for event in events if event.name == "model_run"]
    forwards = forwards[len(forwards) // PASSES :]
    times: dict[str, int] = defaultdict(int)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if event.name.endswith("_kernel_time") and event.ts >= forwards[0].ts:
            operator = str(event.args["op_name"])
            times[operator] += event.dur
            calls[operator] += 1
    total = sum(times.values())
    return Shares(
        forwards=len(forwards),
        inside=total / sum(event.dur for event in forwards),
        shares={
            name: time / total for name, time in sorted(times.items(), key=lambda one: -one[1])
        },
        calls={name: count / len(forwards) for name, count in calls.items()},
    )


def markdown(operators: Operators) -> str:
    """Lay the shares out as a table: one row per operator, one column per profile."""
    profiles = operators.profiles
    largest: dict[str, float] = {}
    for one in profiles:
        for name, share in one.shares.items():
            largest[name] = max(share, largest.get(name, 0))
    by_share = sorted(largest, key=lambda name: -largest[name])
    shown = [name for name in by_share if largest[name] >= SHOWN]
    others = [name for name in largest if name not in shown]
    rows = [
        (label, *(_cell(one, names) for one in profiles))
        for label, names in (*((f"`{name}`", [name]) for name in shown), ("others", others))
    ]
    here = operators.environment
    note = (
        "Shares of the time within operators, and the number of calls in one forward. "
        f"{here.processor}, {here.cores} cores, ONNX Runtime {here.versions['onnxruntime']}."
    )
    columns = ["operator", *(f"{one.data}, {one.precision}, {one.batch_size}" for one in profiles)]
    return tables.markdown(Table(columns, rows, notes=[note]))


def _cell(profile: Profile, names: Sequence[str]) -> str:
    share = sum(profile.shares.get(name, 0) for name in names)
    calls = sum(profile.calls.get(name, 0) for name in names)
    return f"{100 * share:.1f}%, {calls:.0f}" if calls else "-"


STUDY = Study("operators", Operators, measure, markdown)
