"""A trained checkpoint to a verified bundle: load, trace, compare, write, rename.

Nothing appears under the bundle's name unless its model, as read back from its file in its target
runtime, computed what the PyTorch model computes.
"""

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from trainkit.data.readers import Example
from trainkit.data.splits import load_sample
from trainkit.export import parity
from trainkit.export.onnx_graph import OPSET, export_onnx
from trainkit.export.runtimes import runner
from trainkit.export.torchscript import export_torchscript
from trainkit.models.classifier import TextClassifier, torch_runner
from trainkit.serve import bundle
from trainkit.serve.bundle import Bundle, Format, Manifest, Tensor
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import CheckFailedError
from trainkit.trainer import checkpoint
from trainkit.trainer.checkpoint import Loaded
from trainkit.trainer.metrics import Evaluation, evaluate

__all__ = [
    "Exported",
    "Source",
    "check_same_texts",
    "export",
    "export_all",
    "parity_texts",
    "prepare",
]

PARITY_TEXTS = 64

Told = Callable[[str], None]
"""Called with the name of each step as it begins."""


class Source(NamedTuple):
    """A model to export, and the parity matrix with its own logits."""

    loaded: Loaded
    cases: list[parity.Case]


class Exported(NamedTuple):
    """A bundle under its final name, and the reports that its manifest holds."""

    folder: Path
    manifest: Manifest
    parity: parity.Report
    accuracy: Evaluation | None


def export_all(
    folder: Path,
    targets: Sequence[tuple[Path, Format]],
    *,
    data: Sequence[Example] = (),
    force: bool = False,
    told: Told = lambda step: None,
) -> list[Exported]:
    """Export the run in ``folder`` to each target; the model and its logits are made once.

    ``InputError`` for a target that exists comes before any work.
    """
    for target, _ in targets:
        bundle.check_target(target, force=force)
    source = prepare(folder, told)
    return [
        export(source, target, format, data=data, force=force, told=told)
        for target, format in targets
    ]


def prepare(folder: Path, told: Told = lambda step: None) -> Source:
    """Load a run and compute the reference logits, once for all formats."""
    told(f"load {folder}")
    loaded = checkpoint.load(folder)
    cases = parity.reference_cases(
        torch_runner(loaded.model),
        parity.make_cases(loaded.encoder, parity_texts()),
        lambda name: told(f"PyTorch: {name}"),
    )
    return Source(loaded, cases)


def parity_texts() -> list[str]:
    """Return real sentences: the project's own questions, so that no bundle keeps a user's text."""
    return [example.text for example in load_sample()[:PARITY_TEXTS]]


def export(
    source: Source,
    out: Path,
    format: Format,
    *,
    data: Sequence[Example] = (),
    force: bool = False,
    told: Told = lambda step: None,
) -> Exported:
    """Write ``source`` as a bundle to ``out``.

    ``data``, where given, is classified by both models: every label must be the same, and the
    accuracy goes into the manifest. ``ParityError`` or ``CheckFailedError`` where the export
    computes something else, ``InputError`` where ``out`` exists and ``force`` is not set; no bundle
    is written then, and nothing that existed is lost.
    """
    loaded = source.loaded
    with bundle.staged(out, force=force) as stage:
        told(f"export to {format}")
        operators = _write_model(loaded.model, stage / bundle.MODEL_FILES[format], format)
        _write_tokenizer(stage, loaded.encoder)
        _write_config(stage, loaded.model)
        parity.save_cases(stage / parity.PARITY_FILE, source.cases)
        draft = _manifest(loaded, format, operators)
        report, accuracy = _prove(source, Bundle(stage, draft), data, told)
        manifest = bundle.write_manifest(
            stage,
            msgspec.structs.replace(
                draft,
                parity=msgspec.to_builtins(report),
                accuracy=msgspec.to_builtins(accuracy) if accuracy else None,
            ),
        )
    return Exported(out, manifest, report, accuracy)


def _prove(
    source: Source, made: Bundle, data: Sequence[Example], told: Told
) -> tuple[parity.Report, Evaluation | None]:
    """Compare what lies in the bundle's folder, tokenizer and model, with the source."""
    check_same_texts(source, made)
    run = runner(made)
    format = made.manifest.format
    report = parity.compare(source.cases, run, told=lambda name: told(f"{format}: {name}"))
    if not report.passed:
        raise parity.ParityError(report)
    if not data:
        return report, None
    told(f"{format}: {len(data)} texts")
    candidate = Classifier(made.encoder(), run, made.manifest.labels)
    return report, _same_labels(source.loaded.classifier(), candidate, data)


def check_same_texts(source: Source, made: Bundle) -> None:
    """Raise ``CheckFailedError`` where the bundle has other labels or other token ids."""
    labels = source.loaded.checkpoint.model.labels
    if labels != made.manifest.labels:
        raise CheckFailedError(
            f"{made.folder} names the labels {list(made.manifest.labels)}, its source "
            f"{list(labels)}: not the same model, or its label map was changed."
        )
    texts = parity_texts()
    if made.encoder().token_ids(texts) != source.loaded.encoder.token_ids(texts):
        raise CheckFailedError(
            f"the tokenizer of {made.folder} gives other token ids than that of its source."
        )


def _write_model(model: TextClassifier, path: Path, format: Format) -> dict[str, int] | None:
    if format == "onnx":
        return export_onnx(model, path)
    export_torchscript(model, path)
    return None


def _write_tokenizer(stage: Path, encoder: TextEncoder) -> None:
    (stage / "tokenizer.json").write_text(encoder.tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.max_length,
        "pad_token": encoder.tokenizer.id_to_token(encoder.pad_id),
        "padding_side": "right",
        "truncation_side": "right",
    }
    _write_json(stage / "tokenizer_config.json", settings)


def _write_config(stage: Path, model: TextClassifier) -> None:
    """Write ``config.json`` as Hugging Face does: the architecture, and what each label means."""
    config = model.config
    if config.backbone is not None:
        architecture = dict(config.backbone.architecture)
    else:
        architecture = {"model_type": "trainkit-scratch", **msgspec.to_builtins(config.scratch)}
    architecture["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
    architecture["label2id"] = {label: i for i, label in enumerate(config.labels)}
    architecture["problem_type"] = "single_label_classification"
    _write_json(stage / "config.json", architecture)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _manifest(loaded: Loaded, format: Format, operators: dict[str, int] | None) -> Manifest:
    """Describe the export, as yet without its files and reports."""
    config, training = loaded.checkpoint.model, loaded.checkpoint.training
    batch_axes = ("batch", "sequence")
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return Manifest(
        format_version=bundle.FORMAT_VERSION,
        format=format,
        precision="fp32",
        opset=OPSET if format == "onnx" else None,
        inputs=(
            Tensor("input_ids", "int64", batch_axes),
            Tensor("attention_mask", "int64", batch_axes),
        ),
        outputs=(Tensor("logits", "float32", ("batch", len(config.labels))),),
        labels=config.labels,
        pooling="masked mean",
        max_length=config.max_length,
        pad_id=config.pad_id,
        source={
            "kind": config.kind,
            # The name alone: a backbone's folder is this machine's business.
            "backbone": Path(config.backbone.name).name if config.backbone else None,
            "weights_sha256": loaded.checkpoint.weights_facts.sha256,
            "seed": training.seed,
            "epoch": loaded.checkpoint.epoch,
            "metrics": loaded.checkpoint.metrics,
            "versions": {"trainkit": loaded.checkpoint.versions["trainkit"]}
            | {package: metadata.version(package) for package in packages},
            "padded_because": getattr(loaded.model.encoder, "padded_because", None),
        },
        parity={},
        accuracy=None,
        rewrites=({"name": "strip metadata", "operators": operators},) if operators else (),
        files={},
    )


def _same_labels(
    reference: Classifier, candidate: Classifier, data: Sequence[Example]
) -> Evaluation:
    """Evaluate both on ``data``; ``CheckFailedError`` if one label differs."""
    texts = [example.text for example in data]
    expected = reference.logits(texts).argmax(axis=1)
    logits = candidate.logits(texts)
    changed = int((logits.argmax(axis=1) != expected).sum())
    if changed:
        raise CheckFailedError(
            f"{changed} of {len(texts)} labels on your data changed in the export; "
            "no bundle was written."
        )
    return evaluate(logits, [example.label for example in data], candidate.labels)
