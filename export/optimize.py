"""Rewrite an ONNX text classifier that somebody else exported, and prove after each rewrite.

The reference is the file as it came, in ONNX Runtime. Needs no torch. B batch, S sequence.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from trainkit.export import parity
from trainkit.export.graph_file import save_graph
from trainkit.export.parity_cases import Case, ProgressCallback, masks
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.roles import Roles, find_roles
from trainkit.export.rewrite.table import REWRITES
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, InputError, first_line
from trainkit.serve.onnx_session import open_session
from trainkit.serve.types import FloatArray, Runner

BATCH_SIZES = (1, 2, 7)
LENGTHS = (1, 2, 17, 60)

# What the checker raises.
INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


class OptimizeStep(RewriteResult, frozen=True, kw_only=True):
    """One rewrite: what it did, and the largest difference of a logit from the original then."""

    max_abs: float | None


class Optimized(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a model. ``skipped`` are cases that the original itself cannot answer."""

    source: str
    target: str
    nodes_before: int
    nodes_after: int
    cases: int
    skipped: tuple[str, ...]
    steps: tuple[OptimizeStep, ...]


def optimize(
    source: Path,
    target: Path,
    *,
    force: bool = False,
    on_progress: ProgressCallback = lambda step: None,
) -> Optimized:
    """Write ``source``, rewritten, to ``target``; names, axes and dtypes of its tensors stay.

    Raises InputError if ``source`` is not an ONNX text classifier or ``target`` exists and
    ``force`` is not set, and CheckFailedError if a rewrite changed an answer. Nothing is written
    then.
    """
    _check_paths(source, target, force)
    on_progress(f"load {source}")
    model = _load(source)
    roles = find_roles(model, str(source))
    weights = _weight_files(model)
    cases, skipped = _reference(_runner(source, roles), roles, source, on_progress)
    nodes, steps = len(model.graph), []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".optimize.") as folder:
        # Under its own name already: a graph says by name where its weights are.
        staged = Path(folder) / target.name
        for name, rewrite in REWRITES:
            on_progress(name)
            outcome = rewrite(model)
            worst = None
            if outcome.rewritten:
                worst = _prove(f"rewrite {name}", model, staged, roles, cases, on_progress)
            steps.append(OptimizeStep(**msgspec.structs.asdict(outcome), max_abs=worst))
        # Once more, whole: what counts no rewrite may have changed the graph all the same.
        _prove("all rewrites together", model, staged, roles, cases, on_progress)
        _check_moves(staged, target, weights, force)
        _move(staged, target)
    return Optimized(
        source=str(source),
        target=str(target),
        nodes_before=nodes,
        nodes_after=len(model.graph),
        cases=len(cases),
        skipped=tuple(skipped),
        steps=tuple(steps),
    )


def _check_paths(source: Path, target: Path, force: bool) -> None:
    if not source.is_file():
        raise InputError(f"{source} is not a file; give an ONNX file.")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target} is the model itself; give another file with --out.")
    if target.is_dir() or (target.exists() and not force):
        raise InputError(f"{target} exists; give another file with --out, or --force.")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a directory; create it, or use another --out.")


def _load(source: Path) -> ir.Model:
    try:
        model = ir.load(source)
    except Exception as error:  # protobuf, onnx_ir and the file system each raise their own
        raise InputError(
            f"{source} cannot be read as an ONNX model ({first_line(error)}); give an ONNX file "
            "with its weights beside it."
        ) from None
    if not model.graph.outputs or not len(model.graph):
        raise InputError(f"{source} holds no ONNX graph; give an ONNX file.")
    if not _is_consistent(source):
        for node in model.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
    return model


def _is_consistent(source: Path) -> bool:
    """Tell whether the shapes noted in the file are those that its operators give.

    Exporters know more about axes than can be inferred, but some note their example's sizes.
    """
    try:
        onnx.checker.check_model(source, full_check=True)
    except INVALID:
        return False
    return True


def _weight_files(model: ir.Model) -> set[Path]:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return {Path(one.path).resolve() for one in tensors if isinstance(one, ir.ExternalTensor)}


def _check_moves(staged: Path, target: Path, weights: set[Path], force: bool) -> None:
    """Refuse to replace weights beside the target without --force, or the source's."""
    for file in staged.parent.iterdir():
        place = target.with_name(file.name)
        if place == target or not place.exists():
            continue
        if place.resolve() in weights:
            raise InputError(f"{place} holds the model's own weights; give another --out.")
        if not force:
            raise InputError(f"{place} exists; give another file with --out, or --force.")


def _move(staged: Path, target: Path) -> None:
    """Rename the weights first: a graph without its weights must never be there."""
    for file in sorted(staged.parent.iterdir(), key=lambda file: file.name == staged.name):
        file.replace(target.with_name(file.name))


def _runner(path: Path, roles: Roles) -> Runner:
    """Open ``path`` on the CPU: a function from batch to logits, by the roles of the inputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = open_session(path, options=options)

    def run(batch: Batch) -> FloatArray:
        logits: FloatArray = session.run(None, _feeds(batch, roles))[0]
        return logits

    return run


def _feeds(batch: Batch, roles: Roles) -> dict[str, np.ndarray]:
    """Give each input what it is for, in its dtype."""
    feeds = {str(roles.ids.name): batch.input_ids.astype(_dtype(roles.ids))}
    if roles.mask is not None:
        feeds[str(roles.mask.name)] = batch.attention_mask.astype(_dtype(roles.mask))
    for value, rows in roles.others.items():
        # Types and positions below their table's end, the same ones for the same batch.
        numbers = (batch.input_ids + np.arange(batch.input_ids.shape[1])) % rows
        feeds[str(value.name)] = numbers.astype(_dtype(value))
    return feeds


def _dtype(value: ir.Value) -> np.dtype:
    return (value.dtype or ir.DataType.INT64).numpy()


def _batches(roles: Roles) -> Iterator[tuple[str, Batch]]:
    """Yield random ids under each kind of mask, in each size that the model's axes allow."""
    random = np.random.default_rng(0)
    batch_axis, sequence_axis = roles.fixed
    lengths = LENGTHS if sequence_axis is None else (sequence_axis,)
    batches = BATCH_SIZES if batch_axis is None else (batch_axis,)
    for length, batch in itertools.product(lengths, batches):
        ids = random.integers(0, roles.vocabulary, size=(batch, length), dtype=np.int64)
        for kind, mask in masks(batch, length):
            if roles.mask is not None or kind == "full":
                yield f"{batch} x {length}, {kind}", Batch(ids, mask)


def _reference(
    run: Runner, roles: Roles, source: Path, on_progress: ProgressCallback
) -> tuple[list[Case], list[str]]:
    """Ask the original; a case that it cannot answer is left out, and named."""
    cases, skipped, message = [], [], "no case"
    for name, batch in _batches(roles):
        on_progress(f"original: {name}")
        try:
            logits = run(batch)
        except Exception as error:  # a runtime may raise anything on a shape
            message = first_line(error)
            skipped.append(f"{name}: {message}")
            continue
        if logits.ndim == 2 and len(logits) == len(batch.input_ids) and np.isfinite(logits).all():
            cases.append(Case(name, batch, logits))
        else:
            message = f"shape {logits.shape}, or no numbers"
            skipped.append(f"{name}: {message}")
    if not cases:
        raise InputError(
            f"{source} answers no batch of token ids with logits (batch, labels): {message}; "
            "give a text classifier."
        )
    return cases, skipped


def _prove(
    what: str,
    model: ir.Model,
    path: Path,
    roles: Roles,
    cases: list[Case],
    on_progress: ProgressCallback,
) -> float:
    """Save and compare with the original; ``CheckFailedError`` names rewrite and worst case."""
    try:
        save_graph(model, path)
        run = _runner(path, roles)
    except (*INVALID, InputError) as error:
        raise CheckFailedError(
            f"{what} made a graph that is not valid ({first_line(error)}); nothing was written."
        ) from None
    report = parity.compare(cases, run, on_progress=lambda case: on_progress(f"{what}: {case}"))
    if not report.passed:
        worst = report.worst[0]
        raise CheckFailedError(
            f"{what} changed the model's answers on {report.failed} of "
            f"{report.cases} cases (worst: {worst.case}, {worst.reason}); nothing was written."
        )
    return report.max_abs
