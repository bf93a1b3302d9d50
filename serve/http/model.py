"""A served model: a bundle, its model process and its queue; and all of them by name."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np

from trainkit.serve.bundle import Manifest, open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.cores import usable_cores
from trainkit.serve.encoding import Batch, Text, Tokens, characters
from trainkit.serve.errors import InputError
from trainkit.serve.forward_pool import PROVIDERS
from trainkit.serve.http.batching import Batcher, BatchingPolicy, BatchStats, InferenceResult
from trainkit.serve.http.exceptions import InferenceError, QueueFullError, UnavailableError
from trainkit.serve.http.model_process import ModelProcess
from trainkit.serve.http.model_worker import ProcessSpec
from trainkit.serve.http.settings import Settings
from trainkit.serve.types import FloatArray

logger = logging.getLogger("trainkit.serve")

WARM_WORDS = (1, 16, 128)
# Tokenizing 256 characters takes 0.15 ms, as does the hop to a thread: shorter texts stay here.
SHORT = 256
MOST_CHARACTERS = 8  # that may wait for the tokenizer, for each token that may wait in the queue
RETRY_S = 1.0  # then; a million characters take half as long
QUIET_S = 2.0  # a replaced model stops after this time without a request


class Model:
    """One version of one model, running. Made by ``load``.

    ``classifier`` is there for ``tokens`` and ``predictions``; it holds no model. ``version`` is
    the first 12 hex digits of the manifest's seal. ``on_batch`` is called after each batch.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        manifest: Manifest,
        classifier: Classifier,
        process: ModelProcess,
        settings: Settings,
    ) -> None:
        self.name = name
        self.folder = folder
        self.manifest = manifest
        self.classifier = classifier
        self.version = manifest.sha256[:12]
        self.max_length = manifest.max_length
        self.vocabulary_size = classifier.encoder.tokenizer.get_vocab_size()
        self.on_batch: Callable[[BatchStats], None] = lambda facts: None
        self._process = process
        self._settings = settings
        policy = _policy(manifest, settings)
        self._batcher = Batcher(self._run, policy, lambda facts: self.on_batch(facts))
        self._tokenisers = ThreadPoolExecutor(usable_cores(), "trainkit-tokenise")
        self._characters = 0  # that are tokenised, or wait for it
        self._used_at = 0.0

    @classmethod
    async def load(cls, name: str, folder: Path, settings: Settings) -> "Model":
        """Open, start and warm up; ``InputError`` if the bundle is damaged or does not run."""
        manifest, classifier, process = await asyncio.to_thread(_open, folder, settings)
        model = cls(name, folder, manifest, classifier, process, settings)
        try:
            # The tokenizer and the model were opened after the check; are they of this manifest?
            if (await asyncio.to_thread(open_bundle, folder)).manifest != manifest:
                raise InputError(f"{folder} was replaced while it was opened; load it again.")
            await process.start()
            await model._warm()
        except BaseException:
            await model.close(0)
            raise
        return model

    @property
    def ready(self) -> bool:
        """Whether its model process answered within the last second."""
        return self._process.ready and self._batcher.running

    @property
    def pid(self) -> int | None:
        """The model process; None while there is none."""
        return self._process.pid

    def stats(self) -> dict[str, int]:
        """Return ``queued_rows``, ``queued_tokens`` and ``restarts`` of its model process."""
        return {
            "queued_rows": self._batcher.queued_rows,
            "queued_tokens": self._batcher.queued_tokens,
            "restarts": self._process.restarts,
        }

    async def tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokenize, long texts in a thread.

        Raises ``InputError`` for an invalid text, ``QueueFullError`` if too much text of other
        requests waits, and ``UnavailableError`` once the model is closed.
        """
        count = sum(map(characters, texts))
        if count <= SHORT:
            return self.classifier.tokens(texts)
        if not self._batcher.running:
            raise UnavailableError("the model is stopped")
        most = MOST_CHARACTERS * self._settings.queue_tokens
        if self._characters and self._characters + count > most:
            raise QueueFullError(RETRY_S)
        loop = asyncio.get_running_loop()
        self._characters += count
        try:
            return await loop.run_in_executor(self._tokenisers, self.classifier.tokens, texts)
        finally:
            self._characters -= count
            self._used_at = loop.time()

    async def infer(
        self, rows: Sequence[Tokens], timeout_s: float | None = None
    ) -> InferenceResult:
        """Queue, batch and run rows; raises as :meth:`Batcher.submit` does."""
        if not rows:
            return InferenceResult(
                np.empty((0, len(self.manifest.labels)), dtype=np.float32), 0.0, 0.0
            )
        self._used_at = asyncio.get_running_loop().time()
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        return await self._batcher.submit(rows, timeout_s)

    async def close(self, grace_s: float = 30.0) -> None:
        """Take nothing new, finish what is queued, stop the process."""
        await self._batcher.close(grace_s)
        await self._process.close()
        self._tokenisers.shutdown(wait=False)

    async def retire(self, grace_s: float = 30.0) -> None:
        """Close after ``QUIET_S`` without a request, from callers that got it before a reload."""
        loop = asyncio.get_running_loop()
        self._used_at, end = loop.time(), loop.time() + grace_s
        while loop.time() < end and (self._characters or loop.time() < self._used_at + QUIET_S):
            await asyncio.sleep(QUIET_S / 4)
        await self.close(max(0.0, end - loop.time()))

    async def _run(self, rows: Sequence[Tokens]) -> FloatArray:
        logits = await self._process.run(rows)
        expected = (len(rows), len(self.manifest.labels))
        if logits.shape != expected:
            raise InferenceError(f"the logits are {logits.shape}, and {expected} was expected")
        if not np.isfinite(logits).all():
            raise InferenceError("some logits are NaN or infinite")
        return logits

    async def _warm(self) -> None:
        """Run a few lengths, alone and together, so that the first answers are not slow."""
        rows = await self.tokens([" ".join(["text"] * words) for words in WARM_WORDS])
        try:
            for some in (*([row] for row in rows), rows):
                await self.infer(some, self._settings.start_s)
        except (InferenceError, UnavailableError) as error:
            raise InputError(
                f"{self.folder}: the model does not run ({error}); export the bundle again."
            ) from None


def default_threads(cores: int) -> int:
    """Leave a core to the HTTP worker if two are left.

    With a thread per core, all wait for the one whose core the HTTP worker uses. On two cores, one
    thread takes nearly twice as long for a long text: with MiniLM 14% more TREC questions/s, but
    half the newsgroups posts/s.
    """
    return cores - 1 if cores > 2 else cores


def _open(folder: Path, settings: Settings) -> tuple[Manifest, Classifier, ModelProcess]:
    opened = open_bundle(folder)
    opened.check_served()
    manifest = opened.manifest
    serving = manifest.serving
    threads, providers = settings.threads, settings.providers
    cores = min(usable_cores(), settings.max_threads or usable_cores())
    if serving is not msgspec.UNSET:
        threads = threads or min(serving.threads * serving.workers, cores)
        providers = providers or (serving.provider,)
    files = opened.model_files
    classifier = Classifier.of_bundle(opened, _holds_no_model)
    process = ModelProcess(
        ProcessSpec(
            model=str(opened.model_path),
            files=files if len(files) > 1 else {},
            pad_id=manifest.pad_id,
            token_types=classifier.encoder.token_types,
            threads=threads or default_threads(cores),
            providers=providers or PROVIDERS,
            start_s=settings.start_s,
            hang_s=settings.hang_s,
            return_s=settings.timeout_s,
            ping_s=settings.ping_s,
            silent_s=settings.silent_s,
            kill_s=settings.kill_s,
        )
    )
    return manifest, classifier, process


def _holds_no_model(batch: Batch) -> NoReturn:
    raise AssertionError("the model is in the model process")


def _policy(manifest: Manifest, settings: Settings) -> BatchingPolicy:
    return BatchingPolicy(
        batch_tokens=settings.batch_tokens,
        batch_rows=settings.batch_rows,
        max_wait_ms=settings.max_wait_ms,
        queue_tokens=settings.queue_tokens,
        # The reason why it is not, or null.
        packed=manifest.source.get("padded_because", "unknown") is None,
        equal_lengths=manifest.equal_lengths,
    )


class Models(Mapping[str, Model]):
    """The served models by name. A request keeps the model it got, also across a reload.

    Get it after the request's body: a replaced model stops after ``QUIET_S`` without a request.
    """

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self._models = dict(models)
        self._settings = settings
        self._locks = {name: asyncio.Lock() for name in models}
        self._retiring: dict[Model, asyncio.Task[None]] = {}
        self._closed = False
        self._observe: Callable[[Model, BatchStats], None] = lambda model, facts: None

    @classmethod
    async def load(cls, folders: Mapping[str, Path], settings: Settings) -> "Models":
        """Load all; ``InputError`` of the first that is refused, with none left running."""
        models: dict[str, Model] = {}
        try:
            for name, folder in folders.items():
                models[name] = await Model.load(name, folder, settings)
        except BaseException:
            for model in models.values():
                await model.close(0)
            raise
        return cls(models, settings)

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def observe(self, on_batch: Callable[[Model, BatchStats], None]) -> None:
        """Call ``on_batch`` after each batch of these models, and of those that replace them."""
        self._observe = on_batch
        for model in self._models.values():
            self._watch(model)

    def _watch(self, model: Model) -> None:
        model.on_batch = lambda facts: self._observe(model, facts)

    async def reload(self, name: str, folder: Path | None = None) -> Model:
        """Load a folder beside the running model, warm it up, swap them, drain the old one.

        Raises ``InputError`` if the new one is invalid: the old one stays. Labels may differ.
        It returns when the new one answers; the old one drains in the background.
        """
        if name not in self._models:
            raise InputError(f"{name} is not served; served are: {', '.join(self._models)}.")
        async with self._locks[name]:
            old = self._models[name]
            new = await Model.load(name, folder or old.folder, self._settings)
            if self._closed:
                await new.close(0)
                raise UnavailableError("the server is stopping")
            self._watch(new)
            self._models[name] = new
        logger.info("%s: version %s replaces %s", name, new.version, old.version)
        if new.manifest.labels != old.manifest.labels:
            logger.warning(
                "%s: version %s has other labels than %s", name, new.version, old.version
            )
        self._retiring[old] = asyncio.create_task(old.retire())
        self._retiring[old].add_done_callback(lambda task: self._retiring.pop(old, None))
        return new

    async def close(self, grace_s: float = 30.0) -> None:
        """Drain and stop all."""
        self._closed = True
        models = [*self._models.values(), *self._retiring]
        for task in list(self._retiring.values()):
            task.cancel()
            await asyncio.wait({task})
        await asyncio.gather(*(model.close(grace_s) for model in models))
