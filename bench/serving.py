"""``trainkit serve`` beside what else one could run: rates, added time, a soak, idle CPU.

``python -m trainkit.bench.serving --classifier FOLDER --fp32 BUNDLE --int8 BUNDLE --trec FOLDER
--newsgroups FOLDER`` measures one model in four servers, one at a time, and writes
``bench/results/serving.json``: in each round every server starts anew, is warmed, and is searched
for the highest rate that keeps the p99. Each measurement is kept under ``--work`` as soon as it is
made; ``--resume`` goes on from there.
"""

import hashlib
import http.client
import itertools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import click
import msgspec

from trainkit.bench import load as generator
from trainkit.bench import load_result
from trainkit.bench.engines import PEERS
from trainkit.bench.environment import describe, usable_cores
from trainkit.bench.load_result import LoadSettings
from trainkit.bench.process import last_line
from trainkit.bench.samples import bootstrap_interval
from trainkit.bench.serving_process import cpu_share, memory_watched, started
from trainkit.bench.serving_result import (
    AddedTime,
    Goals,
    Idle,
    Plan,
    Rate,
    Server,
    Serving,
    Soak,
    Texts,
    check,
    growth,
    markdown,
    ratios,
)
from trainkit.console import steps
from trainkit.data.columns import Columns
from trainkit.data.splits import load_split
from trainkit.one_sentence import OneSentence
from trainkit.serve.bundle import open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = ["Launch", "added_time", "main", "random_lengths", "soak"]

RESULTS = Path("bench/results/serving.json")
PROGRAMS = Path(__file__).with_name("servers")
PEER_PYTHON = PEERS / "litserve" / "venv" / "bin" / "python"
WARM_REQUESTS = 30
BLOCK = 20  # texts that the library, then the server, takes one after the other
PAUSE_SECONDS = 0.1  # in which the other one's threads stop spinning
# Finds the rate that the server can carry at all, of which the soak takes its share.
SOAK_P99_MS = 500.0
SOAK_TEXTS = 2000
SOAK_WORDS = 256
LITSERVE_BATCH = 32
# 0 would not wait, but its loop then takes a whole core while nothing comes.
LITSERVE_TIMEOUT_MS = 5.0
# Of the peers' interpreter: what a server is made of.
VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""

Progress = Callable[[str], None]
Kind = TypeVar("Kind", bound=msgspec.Struct)


class Launch(NamedTuple):
    """A server and the command that starts it; ``bundle`` is of trainkit's own."""

    server: Server
    command: tuple[str, ...]
    bundle: Path | None = None


class Corpus(NamedTuple):
    """What is sent, and its description."""

    about: Texts
    texts: Sequence[str]


@click.command(cls=OneSentence)
@click.option("--classifier", type=click.Path(path_type=Path), required=True)
@click.option("--fp32", type=click.Path(path_type=Path), required=True)
@click.option("--int8", type=click.Path(path_type=Path), required=True)
@click.option("--trec", default="data/trec", show_default=True)
@click.option("--newsgroups", default="data/newsgroups20", show_default=True)
@click.option("--trec-p99", default=50.0, show_default=True, help="Milliseconds.")
@click.option("--newsgroups-p99", default=50.0, show_default=True, help="Milliseconds.")
@click.option("--relaxed-p99", default=500.0, show_default=True, help="Of newsgroups again.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--soak-minutes", default=10.0, show_default=True)
@click.option("--peers-python", type=click.Path(path_type=Path), default=PEER_PYTHON)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/serving"))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--resume", is_flag=True, help="Go on where the last time ended.")
@click.option("--quick", is_flag=True, help="To try it: seconds, one round; no goal is checked.")
def main(
    classifier: Path,
    fp32: Path,
    int8: Path,
    trec: str,
    newsgroups: str,
    trec_p99: float,
    newsgroups_p99: float,
    relaxed_p99: float,
    rounds: int,
    soak_minutes: float,
    peers_python: Path,
    work: Path,
    out: Path,
    resume: bool,
    quick: bool,
) -> None:
    """Measure the servers of one model."""
    # As with Ctrl-C: the servers, which are in sessions of their own, end with this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threads = max(1, usable_cores() - 1)  # as trainkit serve has by itself, and LitServe too
    launches = list(_launches(classifier, fp32, int8, peers_python, threads))
    posts = _texts(newsgroups)
    corpora = [
        _corpus("TREC", _texts(trec), trec_p99, rate=100 if quick else 20),
        _corpus("newsgroups", posts, newsgroups_p99, rate=100 if quick else 5),
        # Where a long post alone takes longer than the limit, this one still compares servers.
        _corpus(f"newsgroups {relaxed_p99:g}", posts, relaxed_p99, rate=100 if quick else 5),
    ]
    plan = Plan(
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
    with steps() as told:
        serving = _measure(launches, corpora, plan, work, told)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(serving))
    click.echo(markdown(serving))
    if not quick:
        check(serving)


def _measure(
    launches: Sequence[Launch], corpora: Sequence[Corpus], plan: Plan, work: Path, told: Progress
) -> Serving:
    """Make what is not there yet, in turns; the report is of all that is there then."""
    environment = describe()
    ours = [launch for launch in launches if launch.bundle is not None]
    found = _rates(launches, corpora, plan, work, told)
    idle = _each(launches, work, Idle, lambda one: _idle(one, plan, told))
    first, varied = corpora[0].texts, random_lengths(corpora[-1].texts)
    added = _each(ours, work, AddedTime, lambda one: added_time(one, first, plan, told))
    soaks = _each(ours, work, Soak, lambda one: soak(one, varied, plan, told))
    return Serving(
        command=("python", "-m", "trainkit.bench.serving", *_without_paths(sys.argv[1:])),
        date=datetime.now(UTC).replace(microsecond=0),
        environment=environment,
        plan=plan,
        goals=Goals(),
        rates=found,
        ratios=tuple(ratios(found)),
        added=added,
        soaks=soaks,
        idle=idle,
    )


def _rates(
    launches: Sequence[Launch], corpora: Sequence[Corpus], plan: Plan, work: Path, told: Progress
) -> tuple[Rate, ...]:
    """Search every server's rate on every corpus, in every round."""
    found: list[Rate] = []
    for number, corpus, launch in itertools.product(range(plan.rounds), corpora, launches):
        name = f"{launch.server.name}, {corpus.about.name}"
        raw = work / f"rate-{launch.server.name}-{corpus.about.name}-{number}.json"
        if not raw.exists():
            begin = _begin(found, launch, corpus)
            step = _named(told, f"{name}, round {number + 1} of {plan.rounds}")
            _search(launch, corpus, plan, begin, raw, step)
        found.append(_rate(load_result.load(raw), launch, corpus, number))
    return tuple(found)


def _launches(
    classifier: Path, fp32: Path, int8: Path, python: Path, threads: int
) -> Iterator[Launch]:
    """Describe every server; ``InputError`` where the peers' environment was not made."""
    if not python.is_file():
        raise InputError(f"{python} does not exist; make the peers' environment: make peers")
    for precision, bundle in (("fp32", fp32), ("int8", int8)):
        command = (sys.executable, "-P", "-m", "trainkit", "serve", f"model={bundle}")
        server = Server(
            name=f"trainkit {precision}",
            about=f"trainkit serve with its defaults, --threads {threads}",
            versions=_versions(Path(sys.executable), "trainkit", "uvicorn", "onnxruntime"),
        )
        options = ("--port", "0", "--threads", str(threads), "--drain-seconds", "0")
        yield Launch(server, (*command, *options), bundle)
    server = Server(
        name="naive",
        about="FastAPI, a plain def endpoint, transformers pipeline in fp32, defaults",
        versions=_versions(python, "fastapi", "uvicorn", "transformers", "torch"),
    )
    yield Launch(server, (str(python), "-P", str(PROGRAMS / "naive.py"), str(classifier)))
    settings = (str(LITSERVE_BATCH), str(LITSERVE_TIMEOUT_MS), str(threads))
    server = Server(
        name="litserve",
        about=f"LitServe, the fp32 bundle's model, max_batch_size {LITSERVE_BATCH}, batch_timeout "
        f"{LITSERVE_TIMEOUT_MS:g} ms, one inference process with {threads} threads, one front",
        versions=_versions(python, "litserve", "uvicorn", "onnxruntime", "tokenizers"),
    )
    program = str(PROGRAMS / "litserve_app.py")
    yield Launch(server, (str(python), "-P", program, str(fp32), *settings))


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
    return [example.text for example in load_split(source, Columns(), "test")]


def _corpus(name: str, texts: Sequence[str], p99_below_ms: float, rate: float) -> Corpus:
    about = Texts(
        name=name,
        count=len(texts),
        median_characters=int(statistics.median(map(len, texts))),
        sha256=hashlib.sha256(msgspec.json.encode(list(texts))).hexdigest(),
        p99_below_ms=p99_below_ms,
        rate=rate,
    )
    return Corpus(about, texts)


def random_lengths(texts: Sequence[str], seed: int = 0) -> list[str]:
    """Return the beginnings of texts, from 1 to 256 words, every power of two as likely."""
    rng = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < SOAK_TEXTS:
        words = rng.choice(texts).split()
        kept = " ".join(words[: round(2 ** rng.uniform(0, SOAK_WORDS.bit_length() - 1))])
        chosen.extend([kept] if kept else [])
    return chosen


def _prepare(work: Path, plan: Plan, resume: bool) -> None:
    """Empty the folder, or make sure that what lies there was measured by the same plan."""
    file = work / "plan.json"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)  # this program's own, from its last time
    elif file.exists() and msgspec.json.decode(file.read_bytes(), type=Plan) != plan:
        raise InputError(
            f"{work} was begun with other servers, texts or times; give the same options, or leave "
            "--resume out to begin anew."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(file, pretty_json(plan))


def _each(
    launches: Sequence[Launch], work: Path, kind: type[Kind], measure: Callable[[Launch], Kind]
) -> tuple[Kind, ...]:
    """Return what each server's file holds; measured first where it is not there."""
    found = []
    for launch in launches:
        file = work / f"{kind.__name__.lower()}-{launch.server.name}.json"
        if not file.exists():
            write_atomically(file, pretty_json(measure(launch)))
        found.append(msgspec.json.decode(file.read_bytes(), type=kind))
    return tuple(found)


def _named(told: Progress, name: str) -> Progress:
    return lambda step: told(f"{name}: {step}")


def _begin(found: Sequence[Rate], launch: Launch, corpus: Corpus) -> float:
    """Return where a search begins: later rounds at half of what the earlier ones found."""
    key = (launch.server.name, corpus.about.name)
    known = [
        one.requests_per_s
        for one in found
        if (one.server, one.texts) == key and one.requests_per_s is not None
    ]
    return max(corpus.about.rate, min(known, default=0.0) / 2)


def _load_settings(plan: Plan, rate: float, p99_below_ms: float | None) -> LoadSettings:
    return LoadSettings(
        rate=rate,
        duration_s=plan.duration_s,
        warm_up_s=plan.warm_up_s,
        max_seconds=plan.max_search_s,
        p99_below_ms=p99_below_ms,
    )


def _search(
    launch: Launch, corpus: Corpus, plan: Plan, rate: float, raw: Path, told: Progress
) -> None:
    """Start the server, find its rate, keep every sample."""
    told("starting")
    settings = _load_settings(plan, rate, corpus.about.p99_below_ms)
    with started(launch.command, launch.server.name) as (url, _):
        target = generator.Target(f"{url}/classify", corpus.texts)
        _warm(target.url, corpus.texts)
        result = generator.run(target, settings, data=corpus.about.name, progress=told)
    if result.interrupted:
        raise KeyboardInterrupt
    load_result.save(result, raw)


def _rate(result: load_result.LoadResult, launch: Launch, corpus: Corpus, number: int) -> Rate:
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


def _idle(launch: Launch, plan: Plan, told: Progress) -> Idle:
    told(f"{launch.server.name}: idle for {plan.idle_s:g} s")
    with started(launch.command, launch.server.name) as (url, process):
        _warm(f"{url}/classify", ["How far is Mars?"])
        time.sleep(PAUSE_SECONDS)
        share = cpu_share(process, plan.idle_s)
    return Idle(server=launch.server.name, seconds=plan.idle_s, cpu_share=share)


def added_time(launch: Launch, texts: Sequence[str], plan: Plan, told: Progress) -> AddedTime:
    """Time single texts in this process and over one connection, in alternating blocks.

    Both have as many threads. The first call of a block wakes threads and is not counted.
    """
    assert launch.bundle is not None
    classify = Classifier.load(launch.bundle, threads=plan.threads)
    library: list[tuple[float, ...]] = []
    served: list[tuple[float, ...]] = []
    with started(launch.command, launch.server.name) as (url, _):
        _warm(f"{url}/classify", texts)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        for number in range(plan.added_blocks):
            told(f"{launch.server.name}: one client, block {number + 1} of {plan.added_blocks}")
            block = [texts[(number * BLOCK + place) % len(texts)] for place in range(BLOCK)]
            library.append(_timed(classify, block))
            served.append(_timed(lambda text: _post(connection, [text]), block))
        connection.close()
    library_p50, http_p50 = (_median(chain) for chain in (library, served))
    pairs = zip(served, library, strict=True)
    own = [statistics.median(over) - statistics.median(inside) for over, inside in pairs]
    return AddedTime(
        server=launch.server.name,
        library_p50_ms=library_p50,
        http_p50_ms=http_p50,
        added_p50_ms=http_p50 - library_p50,
        interval_ms=bootstrap_interval(own),
        library_ms=tuple(library),
        http_ms=tuple(served),
    )


def _median(blocks: Sequence[Sequence[float]]) -> float:
    return statistics.median(value for block in blocks for value in block)


def _timed(call: Callable[[str], object], texts: Sequence[str]) -> tuple[float, ...]:
    time.sleep(PAUSE_SECONDS)
    call(texts[0])
    taken = []
    for text in texts:
        start = time.perf_counter()
        call(text)
        taken.append(round(1000 * (time.perf_counter() - start), 4))
    return tuple(taken)


def _post(connection: http.client.HTTPConnection, texts: Sequence[str]) -> None:
    """Send one request and read its answer whole; ``CheckFailedError`` where it is no answer."""
    body = msgspec.json.encode({"texts": texts})
    connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise CheckFailedError(f"/classify answered HTTP {response.status}: {content[:200]!r}")


def _warm(url: str, texts: Sequence[str]) -> None:
    """Ask one text after the other until it is warm; it may not listen yet at the beginning."""
    until = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
            connection.connect()
            break
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise CheckFailedError(f"nothing listens at {url} after a minute.") from None
            time.sleep(PAUSE_SECONDS)
    try:
        for number in range(WARM_REQUESTS):
            _post(connection, [texts[number % len(texts)]])
    finally:
        connection.close()


def soak(launch: Launch, texts: Sequence[str], plan: Plan, told: Progress) -> Soak:
    """Find the rate for these texts, then load the same process for long at a share of it."""
    name = launch.server.name
    with started(launch.command, name) as (url, process):
        target = generator.Target(f"{url}/classify", texts)
        _warm(target.url, texts)
        settings = _load_settings(plan, plan.texts[-1].rate, SOAK_P99_MS)
        found = generator.run(target, settings, progress=_named(told, f"{name}, before the soak"))
        if found.search is None or found.search.rate is None:
            raise CheckFailedError(f"{name} has no rate to soak it at: {found.search}")
        rate = plan.soak_share * found.search.rate
        told(f"{name}: soak, {plan.soak_s / 60:.1f} minutes at {rate:.0f} requests/s")
        settings = LoadSettings(
            rate=rate,
            duration_s=plan.soak_s,
            warm_up_s=plan.warm_up_s,
            max_requests=10_000_000,
        )
        due = generator.schedule(settings)
        with memory_watched(process, min(5.0, plan.soak_s / 20)) as memory:
            run = generator.generate(target, settings, due)
    if run.interrupted:
        raise KeyboardInterrupt
    longest = max(len(series.seconds) for series in memory)
    if any(len(series.seconds) < 0.9 * longest for series in memory):
        raise CheckFailedError(f"a process of {name} came or went during the soak.")
    grown: dict[str, float] = {}
    for series in memory:
        grown[series.role] = max(growth(series), grown.get(series.role, -1.0))
    return Soak(
        server=name,
        seconds=plan.soak_s,
        highest_per_s=found.search.rate,
        rate=rate,
        requests=run.requests,
        answered=run.answered,
        errors=run.errors,
        p50_ms=run.p50_ms,
        p99_ms=run.p99_ms,
        max_ms=run.max_ms,
        noisy_because=run.noisy_because,
        growth=grown,
        memory=tuple(memory),
    )


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """Return what was typed, of paths the last part alone: a report can be published as it is."""
    return [Path(one).name if "/" in one else one for one in arguments]


if __name__ == "__main__":
    main()
