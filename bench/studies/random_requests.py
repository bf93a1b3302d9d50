"""A process that serves random requests and samples its memory, with no more than serving imports.

``python -m trainkit.bench.studies random_requests BUNDLE COUNT`` prints one JSON object: the
resident bytes after every hundred requests, and the seconds of all.
"""

import json
import sys
import time
from collections.abc import Iterator

import numpy as np

from trainkit.bench.measure.procfs import rss_bytes
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import Tokens

SAMPLE_EVERY = 100
MAX_ROWS, MAX_LENGTH = 32, 512
# n**-EXPONENT is the weight of n texts in a request: nine of ten have three at most.
EXPONENT = 2.5
SEED = 0


def requests(count: int, vocabulary: int, max_length: int = MAX_LENGTH) -> Iterator[list[Tokens]]:
    """Yield requests of 1 to 32 texts of random ids, lengths log-uniform; the same every time."""
    random = np.random.default_rng(SEED)
    sizes = np.arange(1, MAX_ROWS + 1)
    weights = sizes**-EXPONENT
    for rows in random.choice(sizes, size=count, p=weights / weights.sum()).tolist():
        lengths = np.exp(random.uniform(0, np.log(max_length + 1), size=rows)).astype(int)
        yield [
            Tokens(random.integers(0, vocabulary, length).tolist(), [0] * length)
            for length in lengths.tolist()
        ]


def main(bundle: str, count: str) -> None:
    """Serve as a program with the library does, with all its defaults."""
    classify = Classifier.load(bundle)
    vocabulary = classify.encoder.tokenizer.get_vocab_size()
    max_length = min(MAX_LENGTH, classify.encoder.max_length)
    sampled = []
    start = time.perf_counter()
    for number, rows in enumerate(requests(int(count), vocabulary, max_length), start=1):
        classify.logits_of(rows)
        if number % SAMPLE_EVERY == 0:
            sampled.append(rss_bytes())
    print(json.dumps({"rss_bytes": sampled, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
