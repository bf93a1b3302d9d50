"""Where a forward's time goes, operator by operator, as ONNX Runtime's own profiler tells.

``python -m trainkit.bench.studies operators BUNDLE... --data data/trec`` runs batches of real
texts, cut as serving cuts them, and writes ``bench/results/operators.json``. Only shares are kept:
the profiler takes some microseconds an operator, so that times are longer than without it.
"""

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import click
import msgspec
import onnxruntime as ort

from trainkit.bench.measure.environment import Environment, describe
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps
from trainkit.data.columns import Columns
from trainkit.data.splits import load_split
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.cores import usable_cores
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.serve.forward_pool import split_batches
from trainkit.serve.onnx_session import onnx_runner

__all__ = ["Operators", "Profile", "Shares", "load", "main", "markdown", "profile", "shares"]

RESULTS = Path("bench/results/operators.json")
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


class Operators(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``operators.json``."""

    schema: Literal["trainkit-operators/1"] = "trainkit-operators/1"
    command: tuple[str, ...]
    environment: Environment
    profiles: tuple[Profile, ...]


class Event(msgspec.Struct):
    """One line of ONNX Runtime's profile; ``ts`` and ``dur`` in microseconds."""

    name: str = ""
    ts: int = 0
    dur: int = 0
    args: Mapping[str, object] = msgspec.field(default_factory=dict)


@click.command(cls=ErrorReportingCommand)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--data", multiple=True, required=True)
@click.option(
    "--texts",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Of the test set, from its start.",
)
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=click.IntRange(min=1), default=[1, 32]
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    bundles: tuple[Path, ...],
    data: tuple[str, ...],
    texts: int,
    batch_sizes: tuple[int, ...],
    out: Path,
) -> None:
    """Profile BUNDLES on each data set."""
    found = []
    with steps() as told:
        for source in data:
            examples, name = load_split(source, Columns())[:texts], Path(source).name
            for bundle in map(open_bundle, bundles):
                for size in batch_sizes:
                    told(f"{bundle.folder}: {name}, batches of {size}")
                    made = _batches(bundle, [one.text for one in examples], size)
                    found.append(profile(bundle, made, name, size))
    operators = Operators(
        command=("python", "-m", "trainkit.bench.studies.operators", *sys.argv[1:]),
        environment=describe(),
        profiles=tuple(found),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(operators))
    click.echo(markdown(operators))


def _batches(bundle: BundleFiles, texts: Sequence[str], size: int) -> list[Batch]:
    encoder = bundle.encoder()
    return [encoder.encode(texts[start : start + size]) for start in range(0, len(texts), size)]


def profile(bundle: BundleFiles, batches: Iterable[Batch], data: str, batch_size: int) -> Profile:
    """Run ``batches`` some times in an ONNX bundle; ``InputError`` where it is of another format.

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


def load(path: Path = RESULTS) -> Operators:
    """Read ``operators.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Operators)


def markdown(operators: Operators) -> str:
    """Lay the shares out as a table: a row an operator, a column a profile."""
    profiles = operators.profiles
    names = {
        name: max(one.shares.get(name, 0) for one in profiles)
        for one in profiles
        for name in one.shares
    }
    shown = [name for name in sorted(names, key=lambda name: -names[name]) if names[name] >= SHOWN]
    heads = [f"{one.data}, {one.precision}, {one.batch_size}" for one in profiles]
    lines = [f"| operator | {' | '.join(heads)} |", "|---|" + "---:|" * len(profiles)]
    for name in shown:
        cells = [_cell(one.shares.get(name, 0), one.calls.get(name, 0)) for one in profiles]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    rest = [
        _cell(
            sum(share for name, share in one.shares.items() if name not in shown),
            sum(count for name, count in one.calls.items() if name not in shown),
        )
        for one in profiles
    ]
    lines.append(f"| others | {' | '.join(rest)} |")
    here = operators.environment
    return "\n".join(
        [
            *lines,
            "",
            "Shares of the time within operators, and how many of each one forward has. "
            f"{here.processor}, {here.cores} cores, ONNX Runtime {here.versions['onnxruntime']}.",
        ]
    )


def _cell(share: float, calls: float) -> str:
    return f"{100 * share:.1f} %, {calls:.0f}" if calls else "-"


if __name__ == "__main__":
    main()
