"""Classifies a large file in several processes, through Ray Data; yields JSON lines.

A worker gets the position of its chunk, so every machine must be able to read the file and the
bundle at the same paths. Chunks do not depend on the number of workers, nor does the result.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.serve.bundle import open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.errors import InputError
from trainkit.serve.file_answers import answers
from trainkit.serve.text_file import Chunk, TextFile

MOST_BLOCKS = 1000  # Ray keeps a record of each


class Worker:
    """An actor of Ray Data: a classifier with one thread, and batches of chunks."""

    def __init__(self, bundle: str, file: TextFile) -> None:
        self.classify = Classifier.load(bundle, threads=1)
        self.file = file

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer chunks, given as arrays of their fields."""
        chunks = (Chunk(*map(int, one)) for one in zip(*map(batch.get, Chunk._fields), strict=True))
        found = [answers(self.classify, self.file, chunk) for chunk in chunks]
        return {"answers": np.array(found, dtype=object)}


def ray_answers(
    bundle: Path, file: TextFile, chunks: Sequence[Chunk], workers: int | None = None
) -> Iterator[bytes]:
    """Yield the answers of each chunk in order, computed by ``workers`` processes of one core each.

    The cluster is the one that ``RAY_ADDRESS`` names, else this machine for as long as it takes;
    ``workers`` None is one per core. Raises ``InputError`` if the bundle is damaged or the cluster
    has fewer cores.
    """
    open_bundle(bundle)  # one error here instead of one per worker
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        # "local": never a cluster that somebody else happens to run here.
        ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        if (workers or 1) > cores:
            raise InputError(f"--workers {workers}: the cluster has {cores} cores; ask for fewer.")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        given = [chunk._asdict() for chunk in chunks]
        computed = ray.data.from_items(
            given, override_num_blocks=min(len(given), MOST_BLOCKS)
        ).map_batches(
            Worker,
            fn_constructor_args=(str(bundle.resolve()), file),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or cores, len(chunks))),
        )
        for row in computed.iter_rows():
            yield row["answers"]
    finally:
        ray.shutdown()
