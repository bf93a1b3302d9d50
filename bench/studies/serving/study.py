"""``trainkit serve`` beside other servers: rates, added time, a soak, idle CPU.

One model in four servers, one at a time: in each round every server starts, is warmed, and is
searched for the highest rate that keeps the p99. Each measurement is kept under ``--work``, where
``--resume`` goes on. The peers run in the environment of ``make peers``.
"""

import hashlib
import itertools
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import msgspec

from trainkit.bench.engines.registry import peers_folder
from trainkit.bench.load import generator
from trainkit.bench.load import result as load_result
from trainkit.bench.race.worker_process import last_line
from trainkit.bench.studies.serving.measure import (
    PAUSE_SECONDS,
    ProgressCallback,
    ServerLaunch,
    added_time,
    load_settings,
    named,
    random_lengths,
    soak,
    warm,
)
from trainkit.bench.studies.serving.process import cpu_share, started
from trainkit.bench.studies.serving.result import (
    AddedTime,
    Idle,
    Rate,
    SentTexts,
    ServerInfo,
    ServingFigures,
    ServingGoals,
    ServingPlan,
    Soak,
    check,
    markdown,
    ratios,
)
from trainkit.bench.studies.study import Session, Study, head
from trainkit.data.columns import Columns
from trainkit.data.splits import load_split
from trainkit.serve.bundle import open_bundle
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.serve.http.model import default_threads

PROGRAMS = Path(__file__).parent
LITSERVE_BATCH = 32
# 0 would not wait, but its loop then takes a whole core while nothing comes.
LITSERVE_TIMEOUT_MS = 5.0
# Of the peers' interpreter: what a server is made of.
VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""

Kind = TypeVar("Kind", bound=msgspec.Struct)


class SentCorpus(NamedTuple):
    """What is sent, and its description."""

    about: SentTexts
    texts: Sequence[str]


@click.option("--classifier", type=click.Path(path_type=Path), required=True)
@click.option("--fp32", type=click.Path(path_type=Path), required=True)
@click.option("--int8", type=click.Path(path_type=Path), required=True)
@click.option("--trec", default="data/trec", show_default=True)
@click.option("--newsgroups", default="data/newsgroups20", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--soak-minutes", default=10.0, show_default=True)
@click.option("--peers-python", type=click.Path(path_type=Path), help="[default: of make peers]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/serving"))
@click.option("--resume", is_flag=True, help="Continue an interrupted measurement.")
@click.option("--quick", is_flag=True, help="Try it in seconds, with one round.")
def measure(
    session: Session,
    classifier: Path,
    fp32: Path,
    int8: Path,
    trec: str,
    newsgroups: str,
    rounds: int,
    soak_minutes: float,
    peers_python: Path | None,
    work: Path,
    resume: bool,
    quick: bool,
) -> ServingFigures:
    """Measure the servers of one model."""
    threads = default_threads(usable_cores())  # for LitServe too
    python = peers_python or peers_folder() / "litserve" / "venv" / "bin" / "python"
    launches = list(_launches(classifier, fp32, int8, python, threads))
    corpora = _corpora(_texts(trec), _texts(newsgroups), quick)
    plan = ServingPlan(
        servers=tuple(launch.server for launch in launches),
        texts=tuple(corpus.about for corpus in corpora),
        bundles={path.name: open_bundle(path).manifest.sha256 for path in (fp32, int8)},
        threads=threads,
        rounds=1 if quick else rounds,
        duration_s=1.0 if quick else 8.0,
        warm_up_s=0.2 if quick else 2.0,
        max_search_s=6.0 if quick else 180.0,
        added_blocks=2 if quick else 30,
        soak_s=5.0 if quick else 60 * soak_minutes,
        soak_share=0.7,
        idle_s=1.0 if quick else 20.0,
    )
    _prepare(work, plan, resume)
    with _ended_by_sigterm():
        return _measure(launches, corpora, plan, work, session)


def _corpora(questions: Sequence[str], posts: Sequence[str], quick: bool) -> list[SentCorpus]:
    return [
        _corpus("TREC", questions, 50.0, rate=100 if quick else 20),
        _corpus("newsgroups", posts, 50.0, rate=100 if quick else 5),
        # If a long post alone takes longer than that limit, this one still compares the servers.
        _corpus("newsgroups 500", posts, 500.0, rate=100 if quick else 10),
    ]


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As with Ctrl-C: the servers, which are in sessions of their own, end with this program."""
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _measure(
    launches: Sequence[ServerLaunch],
    corpora: Sequence[SentCorpus],
    plan: ServingPlan,
    work: Path,
    session: Session,
) -> ServingFigures:
    """Measure what is missing, in turns, and report everything."""
    begin = head()
    ours = [launch for launch in launches if launch.bundle is not None]
    rates = _rates(launches, corpora, plan, work, session)
    idle = _each(launches, work, Idle, lambda one: _idle(one, plan, session))
    first, varied = corpora[0].texts, random_lengths(corpora[-1].texts)
    session.wait_until_quiet()
    added = _each(ours, work, AddedTime, lambda one: added_time(one, first, plan, session))
    session.wait_until_quiet()
    soaks = _each(ours, work, Soak, lambda one: soak(one, varied, plan, session))
    return ServingFigures(
        **begin,
        plan=plan,
        goals=ServingGoals(),
        rates=rates,
        ratios=tuple(ratios(rates)),
        added=added,
        soaks=soaks,
        idle=idle,
    )


def _rates(
    launches: Sequence[ServerLaunch],
    corpora: Sequence[SentCorpus],
    plan: ServingPlan,
    work: Path,
    session: Session,
) -> tuple[Rate, ...]:
    """Search every server's rate on every corpus, in every round."""
    found: list[Rate] = []
    for number, corpus, launch in itertools.product(range(plan.rounds), corpora, launches):
        name = f"{launch.server.name}, {corpus.about.name}"
        raw = work / f"rate-{launch.server.name}-{corpus.about.name}-{number}.json"
        if not raw.exists():
            session.wait_until_quiet()
            begin = _begin(found, launch, corpus)
            step = named(session, f"{name}, round {number + 1} of {plan.rounds}")
            _search(launch, corpus, plan, begin, raw, step)
        found.append(_rate(load_result.load(raw), launch, corpus, number))
    return tuple(found)


def _launches(
    classifier: Path, fp32: Path, int8: Path, python: Path, threads: int
) -> Iterator[ServerLaunch]:
    """Describe every server; raises ``InputError`` without the peers' environment."""
    if not python.is_file():
        raise InputError(f"{python} does not exist; make the peers' environment: make peers")
    for precision, bundle in (("fp32", fp32), ("int8", int8)):
        command = (sys.executable, "-P", "-m", "trainkit", "serve", f"model={bundle}")
        server = ServerInfo(
            name=f"trainkit {precision}",
            about=f"trainkit serve with its defaults, --threads {threads}",
            versions=_versions(Path(sys.executable), "trainkit-onnx", "uvicorn", "onnxruntime"),
        )
        options = ("--port", "0", "--threads", str(threads), "--drain-seconds", "0")
        yield ServerLaunch(server, (*command, *options), bundle)
    server = ServerInfo(
        name="naive",
        about="FastAPI, a plain def endpoint, transformers pipeline in fp32, defaults",
        versions=_versions(python, "fastapi", "uvicorn", "transformers", "torch"),
    )
    yield ServerLaunch(server, (str(python), "-P", str(PROGRAMS / "naive.py"), str(classifier)))
    settings = (str(LITSERVE_BATCH), str(LITSERVE_TIMEOUT_MS), str(threads))
    server = ServerInfo(
        name="litserve",
        about=f"LitServe, the fp32 bundle's model, max_batch_size {LITSERVE_BATCH}, batch_timeout "
        f"{LITSERVE_TIMEOUT_MS:g} ms, one inference process with {threads} threads, one front",
        versions=_versions(python, "litserve", "uvicorn", "onnxruntime", "tokenizers"),
    )
    program = str(PROGRAMS / "litserve_app.py")
    yield ServerLaunch(server, (str(python), "-P", program, str(fp32), *settings))


def _versions(python: Path, *packages: str) -> dict[str, str]:
    done = subprocess.run(
        [str(python), "-P", "-c", VERSIONS, *packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(
            f"{python} has not all of {', '.join(packages)} ({last_line(done.stderr)}); make the "
            "environment again: make peers"
        )
    versions: dict[str, str] = msgspec.json.decode(done.stdout)
    return versions


def _texts(source: str) -> list[str]:
    return [example.text for example in load_split(source, Columns())]


def _corpus(name: str, texts: Sequence[str], p99_below_ms: float, rate: float) -> SentCorpus:
    about = SentTexts(
        name=name,
        count=len(texts),
        median_characters=int(statistics.median(map(len, texts))),
        sha256=hashlib.sha256(msgspec.json.encode(list(texts))).hexdigest(),
        p99_below_ms=p99_below_ms,
        rate=rate,
    )
    return SentCorpus(about, texts)


def _prepare(work: Path, plan: ServingPlan, resume: bool) -> None:
    """Empty the folder, or make sure that what lies there was measured by the same plan."""
    file = work / "plan.json"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)  # this program's own, from its last time
    elif file.exists() and msgspec.json.decode(file.read_bytes(), type=ServingPlan) != plan:
        raise InputError(
            f"{work} was begun with other servers, texts or times; give the same options, or leave "
            "--resume out to start again."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(file, pretty_json(plan))


def _each(
    launches: Sequence[ServerLaunch],
    work: Path,
    kind: type[Kind],
    measure: Callable[[ServerLaunch], Kind],
) -> tuple[Kind, ...]:
    """Return what each server's file holds; measured first where it is not there."""
    found = []
    for launch in launches:
        file = work / f"{kind.__name__.lower()}-{launch.server.name}.json"
        if not file.exists():
            write_atomically(file, pretty_json(measure(launch)))
        found.append(msgspec.json.decode(file.read_bytes(), type=kind))
    return tuple(found)


def _begin(found: Sequence[Rate], launch: ServerLaunch, corpus: SentCorpus) -> float:
    """Return where a search begins: later rounds at half of what the earlier ones found."""
    key = (launch.server.name, corpus.about.name)
    known = [
        one.requests_per_s
        for one in found
        if (one.server, one.texts) == key and one.requests_per_s is not None
    ]
    return max(corpus.about.rate, min(known, default=0.0) / 2)


def _search(
    launch: ServerLaunch,
    corpus: SentCorpus,
    plan: ServingPlan,
    rate: float,
    raw: Path,
    on_progress: ProgressCallback,
) -> None:
    """Start the server, find its rate, keep every sample."""
    on_progress("starting")
    settings = load_settings(plan, rate, corpus.about.p99_below_ms)
    with started(launch.command, launch.server.name) as (url, _):
        target = generator.Target(f"{url}/classify", corpus.texts)
        warm(target.url, corpus.texts)
        result = generator.run(target, settings, data=corpus.about.name, on_progress=on_progress)
    if result.interrupted:
        raise KeyboardInterrupt
    load_result.save(result, raw)


def _rate(
    result: load_result.LoadResult, launch: ServerLaunch, corpus: SentCorpus, number: int
) -> Rate:
    assert result.search is not None
    passed = [run for run in result.runs if not run.failed_because]
    best = max(passed, key=lambda run: run.rate, default=None)
    return Rate(
        server=launch.server.name,
        texts=corpus.about.name,
        round=number,
        requests_per_s=result.search.rate,
        p50_ms=best.p50_ms if best else None,
        p99_ms=best.p99_ms if best else None,
        limited_by=result.search.limited_by,
        summary=result.search.summary,
        noisy_because=result.noisy_because,
    )


def _idle(launch: ServerLaunch, plan: ServingPlan, on_progress: ProgressCallback) -> Idle:
    on_progress(f"{launch.server.name}: idle for {plan.idle_s:g} s")
    with started(launch.command, launch.server.name) as (url, process):
        warm(f"{url}/classify", ["How far is Mars?"])
        time.sleep(PAUSE_SECONDS)
        share = cpu_share(process, plan.idle_s)
    return Idle(server=launch.server.name, seconds=plan.idle_s, cpu_share=share)


def _check(figures: ServingFigures) -> None:
    if figures.plan.soak_s >= 60:  # --quick only tries it
        check(figures)


STUDY = Study("serving", ServingFigures, measure, markdown, _check)
