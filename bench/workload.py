"""The texts of a benchmark, encoded once: every engine gets the same batches, already tokenised."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainkit.serve.bundle import MANIFEST, open_bundle
from trainkit.serve.encoding import Batch, TextEncoder
from trainkit.serve.errors import InputError

__all__ = ["Workload", "prepare"]

TOKENISATIONS = 5


class Workload(NamedTuple):
    """Padded batches in the texts' order; the last one may be smaller.

    ``precisions`` holds one name of the tolerance table a source, in their order.
    ``tokenisation_s`` are the seconds that encoding and padding all texts took, each time.
    """

    batches: list[Batch]
    texts: int
    precisions: list[str]
    tokenisation_s: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)

    @property
    def padding_share(self) -> float:
        """Return the share of positions that hold padding."""
        return 1 - self.tokens / sum(batch.attention_mask.size for batch in self.batches)


class _Facts(NamedTuple):
    encoder: TextEncoder
    labels: tuple[str, ...]
    precision: str


def prepare(sources: Sequence[Path], texts: Sequence[str], batch_size: int) -> Workload:
    """Encode ``texts`` with the tokenizer of the sources, all of which must agree on it.

    ``InputError`` where there is nothing to run, a text is empty, a source is neither a run nor a
    bundle, or two sources differ in labels or in token ids.
    """
    if not sources or not texts:
        raise InputError("a benchmark needs at least one engine and one text; give it some.")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise InputError(f"text {number} of {len(texts)} is empty; leave it out.")
    found = [_open(source) for source in sources]
    tokenisation_s = []
    for _ in range(TOKENISATIONS):
        start = time.perf_counter()
        batches = _encode(found[0].encoder, texts, batch_size)
        tokenisation_s.append(time.perf_counter() - start)
    for source, facts in zip(sources, found, strict=True):
        _check_comparable(source, facts, sources[0], found[0])
        if not _same(batches, _encode(facts.encoder, texts, batch_size)):
            raise InputError(
                f"{source} and {sources[0]} make other tokens of the same texts; "
                "compare engines of one model."
            )
    return Workload(
        batches, len(texts), [facts.precision for facts in found], tuple(tokenisation_s)
    )


def _open(source: Path) -> _Facts:
    if (source / MANIFEST).is_file():
        bundle = open_bundle(source)
        return _Facts(bundle.encoder(), bundle.manifest.labels, bundle.manifest.precision)
    if not (source / "checkpoint.json").is_file():
        raise InputError(
            f"{source} is neither a bundle (no {MANIFEST}) nor a run (no checkpoint.json); "
            "give the folder that train or export named."
        )
    from trainkit.trainer import checkpoint  # torch only where a run is measured

    loaded = checkpoint.load(source)
    return _Facts(loaded.encoder, loaded.checkpoint.model.labels, "fp32")


def _encode(encoder: TextEncoder, texts: Sequence[str], batch_size: int) -> list[Batch]:
    starts = range(0, len(texts), batch_size)
    return [encoder.encode(texts[start : start + batch_size]) for start in starts]


def _check_comparable(source: Path, facts: _Facts, baseline: Path, expected: _Facts) -> None:
    if facts.labels != expected.labels:
        raise InputError(
            f"{source} has the labels {list(facts.labels)}, {baseline} has "
            f"{list(expected.labels)}; compare engines of one model."
        )


def _same(some: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return all(
        {name: array.tobytes() for name, array in one.tensors().items()}
        == {name: array.tobytes() for name, array in two.tensors().items()}
        for one, two in zip(some, other, strict=True)
    )
