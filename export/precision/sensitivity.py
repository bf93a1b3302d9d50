"""Which products suffer most from int8: each quantised alone, by what it does to the logits."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.quantizable import quantizable_names
from trainkit.serve.types import FloatArray

Evaluate = Callable[[Path], FloatArray]
"""A candidate's file to its (N, C) logits on the texts."""

MOST_GROUPS = 48  # deeper graphs are measured in groups of neighbours


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``names`` quantised, all else in fp32: the change of the logits, root of the mean square.

    ``rms`` is None if there were no logits, or they were not finite.
    """

    names: tuple[str, ...]
    rms: float | None


def rank(
    fresh: Callable[[], ir.Model],
    settings: Int8Settings,
    quantised: Callable[[Int8Settings], Path],
    evaluate: Evaluate,
    reference: FloatArray,
) -> tuple[Sensitivity, ...]:
    """Return the sites of a graph, most sensitive first.

    ``quantised`` writes the graph under given settings to a file, ``reference`` (N, C) are the
    logits of fp32. A group without finite logits comes first.
    """
    names = quantizable_names(fresh())
    found = []
    for group in _groups(names):
        others = tuple(name for name in names if name not in group)
        path = quantised(msgspec.structs.replace(settings, keep=others))
        found.append(Sensitivity(names=group, rms=_change(evaluate, path, reference)))
    return tuple(sorted(found, key=_worst_first))


def _change(evaluate: Evaluate, path: Path, reference: FloatArray) -> float | None:
    try:
        logits = evaluate(path)
    except Exception:  # a runtime that cannot run this one: the worst
        return None
    rms = float(np.sqrt(np.mean(np.square(logits - reference))))
    return rms if np.isfinite(rms) else None


def _worst_first(one: Sensitivity) -> float:
    return -np.inf if one.rms is None else -one.rms


def _groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    size = max(1, math.ceil(len(names) / MOST_GROUPS))
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]
