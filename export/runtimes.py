"""Open whatever computes logits: a bundle in the runtime of its format, or a run in PyTorch.

Each runtime is imported only where it is needed: an ONNX bundle opens without PyTorch.
"""

from pathlib import Path

from trainkit.serve.bundle import MANIFEST, Bundle, open_bundle
from trainkit.serve.classifier import Classifier, Runner
from trainkit.serve.errors import InputError

__all__ = ["open_classifier", "runner"]


def runner(bundle: Bundle, threads: int | None = None) -> Runner:
    """Return the bundle's model as a function from a padded batch to logits.

    ``threads`` is for ONNX Runtime; PyTorch's threads are the process's.
    """
    if bundle.manifest.format == "torchscript":
        from trainkit.export.torchscript_session import torchscript_runner

        return torchscript_runner(bundle.model_path)
    from trainkit.serve.onnx_session import onnx_runner

    return onnx_runner(bundle.model_path, threads=threads)


def open_classifier(folder: Path) -> Classifier:
    """Open a bundle of any format, or a run, as a classifier of texts."""
    if (folder / MANIFEST).is_file():
        bundle = open_bundle(folder)
        return Classifier(bundle.encoder(), runner(bundle), bundle.manifest.labels)
    if not (folder / "checkpoint.json").is_file():
        raise InputError(
            f"{folder} is neither a bundle (no {MANIFEST}) nor a run (no checkpoint.json); "
            "give the folder that train or export named."
        )
    from trainkit.trainer import checkpoint

    return checkpoint.load(folder).classifier()
