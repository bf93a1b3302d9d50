"""Batch invariance: a row's logits must not depend on its neighbours, padding or position.

Each check runs the same sentences in two ways and compares the logits. If the model itself does not
have the property (absolute positions shift with padding on the left), the export need not either.
"""

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from trainkit.models.closeness import Tolerance
from trainkit.serve.encoding import Batch, IntArray, TextEncoder, Tokens
from trainkit.serve.types import FloatArray, Runner

ROWS = 12
EXTRA = 13  # positions of padding

LEFT = "padding on the left"
RIGHT = "padding on the right"


class InvarianceCheck(msgspec.Struct, frozen=True, kw_only=True):
    """How much the logits of the same texts differ between two ways of running them.

    ``applies`` is False if the model itself gives other answers, which is then the ``reason``.
    """

    name: str
    applies: bool
    passed: bool
    max_abs: float
    reason: str = ""


def check_invariance(
    run: Runner, encoder: TextEncoder, texts: Sequence[str], tolerance: Tolerance
) -> tuple[InvarianceCheck, ...]:
    """Run the first texts together, alone, reversed, and with more padding on either side."""
    rows = encoder.tokens(texts[:ROWS])
    together = run(encoder.pad(rows))
    limit = tolerance.limit(together)
    checks = []
    for name, again in _variants(run, encoder, rows):
        difference = np.abs(again() - together)
        passed = bool((difference <= limit).all())  # NaN is not
        checks.append(
            InvarianceCheck(
                name=name,
                applies=True,
                passed=passed,
                max_abs=float(difference.max()),
                reason="" if passed else "the answers change",
            )
        )
    return tuple(checks)


def _variants(
    run: Runner, encoder: TextEncoder, rows: Sequence[Tokens]
) -> Iterator[tuple[str, Callable[[], FloatArray]]]:
    batch = encoder.pad(rows)
    extra = min(EXTRA, encoder.max_length - batch.input_ids.shape[1])
    yield "neighbours", lambda: np.concatenate([run(encoder.pad([row])) for row in rows])
    yield "order", lambda: run(encoder.pad(rows[::-1]))[::-1]
    if extra > 0:
        yield RIGHT, lambda: run(_wider(batch, encoder.pad_id, (0, extra)))
        yield LEFT, lambda: run(_wider(batch, encoder.pad_id, (extra, 0)))


def _wider(batch: Batch, pad_id: int, sides: tuple[int, int]) -> Batch:
    def add(array: IntArray, value: int) -> IntArray:
        return np.pad(array, ((0, 0), sides), constant_values=value)

    types = batch.token_type_ids
    return Batch(
        add(batch.input_ids, pad_id),
        add(batch.attention_mask, 0),
        None if types is None else add(types, 0),
    )


def reads_padding(reference: Sequence[InvarianceCheck]) -> bool:
    """Tell whether the model's own answers change with the padding on the right.

    FNet mixes all positions and has no mask; MobileBERT looks at the next one, hidden or not. Such
    a model is right only in batches of texts of one length.
    """
    return any(check.name != LEFT and not check.passed for check in reference)


def excuse_source(
    candidate: Sequence[InvarianceCheck], reference: Sequence[InvarianceCheck]
) -> tuple[InvarianceCheck, ...]:
    """Excuse the candidate from what the model itself does not do; the rest must have passed."""
    own = {check.name for check in reference if not check.passed}
    return tuple(
        msgspec.structs.replace(
            check,
            applies=False,
            passed=True,
            reason="absolute positions shift, in the model itself"
            if check.name == LEFT
            else "the model itself reads its padding",
        )
        if check.name in own
        else check
        for check in candidate
    )
