"""What is computed: texts in batches, made once, so that every engine gets the same.

Texts are tokenised here, in their order of arrival, and that is timed apart. Full batches of one
length are made of the same tokens.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainkit.bench.race.flops import useful_flop
from trainkit.bench.race.protocol import Work
from trainkit.bench.result import BenchmarkSettings, Scenario
from trainkit.data.readers import Example
from trainkit.models.sources import detect
from trainkit.serve.bundle import open_bundle
from trainkit.serve.encoding import Batch, Text, TextEncoder
from trainkit.serve.errors import InputError

TOKENISATIONS = 5
GRID_BATCHES = 4


class Workload(NamedTuple):
    """Padded batches; of texts in their order, the last batch may be smaller.

    ``expected`` holds the right label's number for each text where labels were given.
    ``tokenisation_s`` are the seconds that encoding and padding all texts took, each time.
    """

    name: str
    scenario: Scenario
    batch_size: int
    work: Work
    length: int | None = None
    rate: float | None = None
    expected: tuple[int, ...] | None = None
    tokenisation_s: tuple[float, ...] = ()
    useful_flop: float | None = None

    @property
    def texts(self) -> int:
        """Return the number of texts, or of rows made of their tokens."""
        return sum(len(batch.input_ids) for batch in self.work.batches)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return sum(int(batch.attention_mask.sum()) for batch in self.work.batches)

    @property
    def padding_share(self) -> float:
        """Return the share of positions that hold padding."""
        positions = sum(batch.attention_mask.size for batch in self.work.batches)
        return 1 - self.tokens / positions


class _Facts(NamedTuple):
    encoder: TextEncoder
    labels: tuple[str, ...]
    architecture: dict[str, Any]


def prepare(
    sources: Sequence[Path], examples: Sequence[Example], settings: BenchmarkSettings
) -> list[Workload]:
    """Make the workloads that ``settings`` ask for, with the tokenizer that all sources share.

    Raises ``InputError`` if there is nothing to run, a text is empty, a source is not a classifier,
    or two sources differ in labels or in token ids.
    """
    if not sources or not examples:
        raise InputError("a benchmark needs at least one engine and one text; give it some.")
    for number, example in enumerate(examples, start=1):
        if not example.text.strip():
            raise InputError(f"text {number} of {len(examples)} is empty; leave it out.")
    facts = _common(sources, [example.text for example in examples])
    return list(_workloads(facts, examples, settings))


def _common(sources: Sequence[Path], texts: Sequence[str]) -> _Facts:
    """Open each source once, and make sure that they are the same classifier."""
    first, *others = dict.fromkeys(sources)
    found = _open(first)
    rows = found.encoder.tokens(texts)
    for source in others:
        facts = _open(source)
        if facts.labels != found.labels:
            raise InputError(
                f"{source} has the labels {list(facts.labels)}, {first} has "
                f"{list(found.labels)}; compare engines of one model."
            )
        if facts.encoder.tokens(texts) != rows:
            raise InputError(
                f"{source} and {first} make other tokens of the same texts; "
                "compare engines of one model."
            )
    return found


def _open(source: Path) -> _Facts:
    if detect(source) == "bundle":
        bundle = open_bundle(source)
        architecture = json.loads((source / "config.json").read_bytes())
        return _Facts(bundle.encoder(), bundle.manifest.labels, architecture)
    from trainkit.export.source import open_source  # torch only where it is measured

    opened = open_source(str(source))
    return _Facts(opened.encoder, opened.labels, dict(opened.architecture))


def _workloads(
    facts: _Facts, examples: Sequence[Example], settings: BenchmarkSettings
) -> Iterator[Workload]:
    texts: list[Text] = [example.text for example in examples]
    expected = _expected(facts.labels, examples)
    for batch_size in settings.batch_sizes:
        yield _of_texts(
            facts, texts, batch_size, name=f"texts, batch {batch_size}", scenario="offline"
        )._replace(expected=expected)
    if settings.single_stream:
        single = _of_texts(facts, texts, 1, name="single stream", scenario="single-stream")
        yield single._replace(expected=expected)
    if settings.rates:
        work = _of_texts(facts, texts, 1, name="", scenario="server")
        for rate in settings.rates:
            yield work._replace(name=f"server, {rate:g} requests/s", rate=rate)
    if settings.lengths:
        rows = [row for row in facts.encoder.token_ids(texts) if row]
        if not rows:
            raise InputError("none of the texts has a token; give others.")
        for length, batch_size in itertools.product(settings.lengths, settings.batch_sizes):
            yield _grid(facts, rows, batch_size, length)


def _expected(labels: tuple[str, ...], examples: Sequence[Example]) -> tuple[int, ...] | None:
    """Number the right labels; None where the texts have none, or those of another task."""
    found = {example.label for example in examples}
    if not found & set(labels):
        return None
    if unknown := sorted(found - set(labels)):
        raise InputError(
            f"the model has no label {unknown[0]!r}, which the texts have; its labels are "
            f"{list(labels)}. Give texts of its own task."
        )
    return tuple(labels.index(example.label) for example in examples)


def _of_texts(
    facts: _Facts, texts: Sequence[Text], batch_size: int, *, name: str, scenario: Scenario
) -> Workload:
    starts = range(0, len(texts), batch_size)
    grouped = [list(texts[start : start + batch_size]) for start in starts]
    tokenisation_s = []
    for _ in range(TOKENISATIONS):
        start = time.perf_counter()
        batches = [facts.encoder.encode(group) for group in grouped]
        tokenisation_s.append(time.perf_counter() - start)
    return Workload(
        name=name,
        scenario=scenario,
        batch_size=batch_size,
        work=Work(batches, grouped),
        tokenisation_s=tuple(tokenisation_s),
        useful_flop=_flop(facts, batches),
    )


def _grid(facts: _Facts, texts: Sequence[Sequence[int]], batch_size: int, length: int) -> Workload:
    """Make full batches of the texts' tokens: what a length costs, without their own lengths.

    A row is one text and those behind it, cut to ``length``; the next row begins one text later.
    """
    if length > facts.encoder.max_length:
        raise InputError(
            f"length {length} is beyond the model's {facts.encoder.max_length}; give a lower one."
        )
    shape = (batch_size, length)
    types = np.zeros(shape, np.int64) if facts.encoder.token_types else None
    rows = np.array([_row(texts, first, length) for first in range(GRID_BATCHES * batch_size)])
    batches = [
        Batch(ids, np.ones(shape, np.int64), types) for ids in rows.reshape(GRID_BATCHES, *shape)
    ]
    return Workload(
        name=f"grid, {batch_size} x {length}",
        scenario="grid",
        batch_size=batch_size,
        work=Work(batches, []),
        length=length,
        useful_flop=_flop(facts, batches),
    )


def _row(texts: Sequence[Sequence[int]], first: int, length: int) -> list[int]:
    endless = (texts[number % len(texts)] for number in itertools.count(first))
    return list(itertools.islice(itertools.chain.from_iterable(endless), length))


def _flop(facts: _Facts, batches: Sequence[Batch]) -> float | None:
    lengths = [int(count) for batch in batches for count in batch.attention_mask.sum(axis=1)]
    return useful_flop(facts.architecture, lengths)
