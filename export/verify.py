"""Verify a bundle again on this machine, or against the run that it came from."""

from pathlib import Path

from trainkit.export import parity, parity_cases
from trainkit.export.parity_cases import ProgressCallback
from trainkit.export.runtimes import runner
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.errors import InputError


def verify(
    folder: Path,
    against: str | None = None,
    base: str | None = None,
    on_progress: ProgressCallback = lambda step: None,
) -> parity.ParityReport:
    """Run the bundle over its parity matrix and compare; the caller judges ``report.passed``.

    The reference is the logits that the bundle keeps from its export, or, with ``against``, those
    that the source of this name computes now; its labels and token ids must be the bundle's too.
    ``base`` is the model that an adapter belongs to, if it moved.
    """
    if base is not None and against is None:
        raise InputError("--base goes with --against ADAPTER; give both.")
    bundle = open_bundle(folder)
    path = bundle.folder / parity_cases.PARITY_FILE
    if path.name not in bundle.manifest.files:
        raise InputError(f"{folder} has no {path.name} to verify with; export the bundle again.")
    cases = (
        parity_cases.load_cases(path)
        if against is None
        else _fresh_cases(bundle, against, base, on_progress)
    )
    return parity.compare(
        cases,
        runner(bundle),
        bundle.manifest.precision,
        lambda name: on_progress(f"{bundle.manifest.format}: {name}"),
        bundle.manifest.problem_type,
    )


def _fresh_cases(
    bundle: BundleFiles, against: str, base: str | None, on_progress: ProgressCallback
) -> list[parity_cases.Case]:
    from trainkit.export.bundle_writer import check_same_texts, prepare
    from trainkit.export.source import open_source

    on_progress(f"load {against}")
    source = open_source(against, base=base, max_length=bundle.manifest.max_length)
    check_same_texts(source, bundle)
    return prepare(source, on_progress=on_progress).cases
