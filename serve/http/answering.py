"""From a checked request to logits: the limits of a request, its deadline, and how long it took.

In go texts, or the rows they were encoded to elsewhere; out come the rows and their logits. What
was counted and timed on the way stands in the request's record.
"""

import time
from collections.abc import Sequence

from trainkit.serve.encoding import Text, Tokens, characters
from trainkit.serve.http.exceptions import DeadlineError
from trainkit.serve.http.metrics import Tracing
from trainkit.serve.http.middleware import HTTPError, RequestLog
from trainkit.serve.http.model import Model
from trainkit.serve.http.settings import Settings
from trainkit.serve.types import FloatArray

__all__ = ["Answering"]


class Answering:
    """What every request for logits goes through."""

    def __init__(self, settings: Settings, tracing: Tracing) -> None:
        self._settings = settings
        self._tracing = tracing

    async def infer(
        self,
        record: RequestLog,
        model: Model,
        texts: Sequence[Text] | None,
        rows: Sequence[Tokens] | None,
        timeout_s: float,
    ) -> tuple[Sequence[Tokens], FloatArray]:
        """Return the encoded rows and their logits; the limits are checked before each step."""
        deadline = record.started + min(timeout_s, self._settings.timeout_s)
        begin = time.perf_counter()
        if texts is not None:
            record.texts = len(texts)
            self._check_texts(texts)
            with self._tracing.span("tokenize"):
                rows = await model.tokens(texts)
        assert rows is not None
        record.texts, record.tokens = len(rows), sum(len(row.ids) for row in rows)
        if record.tokens > self._settings.limits.tokens:
            raise HTTPError(
                422,
                f"the texts have {record.tokens} tokens together, and a request may have "
                f"{self._settings.limits.tokens}; send fewer at a time.",
            )
        now = time.perf_counter()
        record.tokenize_s = now - begin
        if now >= deadline:
            raise DeadlineError
        answer = await model.infer(rows, deadline - now)
        record.queue_s, record.infer_s = answer.queue_s, answer.infer_s
        self._tracing.spans_until_now(queue=answer.queue_s, infer=answer.infer_s)
        return rows, answer.logits

    def _check_texts(self, texts: Sequence[Text]) -> None:
        limits = self._settings.limits
        if not 0 < len(texts) <= limits.texts:
            raise HTTPError(422, f"a request has from 1 to {limits.texts} texts, not {len(texts)}.")
        count = sum(map(characters, texts))
        if count > limits.characters:
            raise HTTPError(
                413,
                f"the texts have {count} characters together, and a request may have "
                f"{limits.characters}; send fewer at a time.",
            )
