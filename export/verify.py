"""Repeat a bundle's proof: on this machine, and, where asked, against the run that it came from."""

from collections.abc import Callable
from pathlib import Path

from trainkit.export import matrix, parity
from trainkit.export.runtimes import runner
from trainkit.serve.bundle import Bundle, open_bundle
from trainkit.serve.errors import InputError

__all__ = ["verify"]


def verify(
    folder: Path,
    against: str | None = None,
    base: str | None = None,
    told: Callable[[str], None] = lambda step: None,
) -> parity.Report:
    """Run the bundle over its parity matrix and compare; the caller judges ``report.passed``.

    The reference is the logits that the bundle keeps from its export, or, with ``against``, those
    that the source of this name computes now; its labels and token ids must be the bundle's too.
    ``base`` is the model that an adapter belongs to, where it moved.
    """
    if base is not None and against is None:
        raise InputError("--base goes with --against ADAPTER; give both.")
    bundle = open_bundle(folder)
    path = bundle.folder / matrix.PARITY_FILE
    if path.name not in bundle.manifest.files:
        raise InputError(f"{folder} has no {path.name} to verify with; export the bundle again.")
    cases = (
        matrix.load_cases(path) if against is None else _fresh_cases(bundle, against, base, told)
    )
    return parity.compare(
        cases,
        runner(bundle),
        bundle.manifest.precision,
        lambda name: told(f"{bundle.manifest.format}: {name}"),
        bundle.manifest.problem_type,
    )


def _fresh_cases(
    bundle: Bundle, against: str, base: str | None, told: Callable[[str], None]
) -> list[matrix.Case]:
    from trainkit.export.export import check_same_texts, prepare
    from trainkit.export.source import open_source

    told(f"load {against}")
    source = open_source(against, base=base, max_length=bundle.manifest.max_length)
    check_same_texts(source, bundle)
    return prepare(source, told=told).cases
