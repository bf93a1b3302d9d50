"""Open a bundle in the runtime of its format, or its source in PyTorch.

Each runtime is imported only if it is needed: an ONNX bundle opens without PyTorch.
"""

from pathlib import Path

from trainkit.models.sources import detect, is_kind
from trainkit.serve.bundle import BundleFiles, open_bundle, read_manifest
from trainkit.serve.classifier import Classifier
from trainkit.serve.errors import InputError
from trainkit.serve.formats import Format
from trainkit.serve.types import Runner


def runner(bundle: BundleFiles, threads: int | None = None) -> Runner:
    """Return the bundle's model as a function from a padded batch to logits.

    Raises InputError if its machine code was compiled for another kind of machine.
    """
    if bundle.manifest.machine is not None:
        from trainkit.export.torch_sessions import check_machine

        check_machine(bundle.folder, bundle.manifest.machine)
    return open_model(bundle.model_path, bundle.manifest.format, threads)


def open_model(path: Path, format: Format, threads: int | None = None) -> Runner:
    """Open a model file in the runtime of its format.

    ``threads`` is for ONNX Runtime; PyTorch's threads are the process's.
    """
    if format == "onnx":
        from trainkit.serve.onnx_session import onnx_runner

        return onnx_runner(path, threads=threads)
    from trainkit.export.torch_sessions import torch_runner

    return torch_runner(path, format)


def open_classifier(folder: Path, base: str | None = None) -> Classifier:
    """Open a bundle of any format, a run, a PEFT adapter or a Hugging Face folder.

    ``base`` is the model that an adapter belongs to, if it moved.
    """
    kind = detect(folder)
    if base is not None and kind != "adapter":
        raise InputError(f"--base goes with a PEFT adapter, and {folder} is none; leave it out.")
    if kind == "bundle":
        bundle = open_bundle(folder)
        return Classifier.of_bundle(bundle, runner(bundle))
    if kind == "run":
        from trainkit.trainer import checkpoint

        return checkpoint.load(folder).classifier()
    from trainkit.export.source import open_source

    return open_source(str(folder), base=base).classifier()


def training_seed(folder: Path) -> int:
    """Return the seed of a run, of a bundle's run or of a run's adapter; of anything else 0.

    Where the training had to split its texts, it did so with that.
    """
    if is_kind(folder, "bundle"):
        return int(read_manifest(folder).source.get("seed", 0))
    for run in (folder, folder.resolve().parent):
        if is_kind(run, "run"):
            from trainkit.trainer import checkpoint

            return checkpoint.read(run).seed
    return 0
