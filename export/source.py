"""What can be exported, behind one interface: a run, a Hugging Face classifier, a PEFT adapter."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import nn

from trainkit import __version__
from trainkit.data.splits import load_sample
from trainkit.models import backbone, hub_classifier
from trainkit.models.adapter import adapter_effect, load_adapter
from trainkit.models.classifier import torch_runner
from trainkit.models.config import MINILM
from trainkit.models.hub_classifier import HubClassifier
from trainkit.models.safe_loading import fetch
from trainkit.models.sources import detect
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import ProblemType
from trainkit.serve.types import Runner
from trainkit.trainer import checkpoint

OWN_HEAD = "of the model's own head"
EFFECT_TEXTS = 16  # on which an adapter must change the logits


class ExportSource(NamedTuple):
    """A classifier to export, and what its export must compute.

    ``model`` takes the inputs that ``encoder`` makes, (B, S) int64 each, and gives (B, C) logits.
    ``reference`` is the source's own forward, before anything was changed for the export.
    ``equal_lengths``: its answers change with padding. ``architecture`` becomes ``config.json``.
    ``facts`` go into the manifest, ``notes`` to the user. ``temperature`` is a run's, fitted on its
    validation texts.
    """

    model: nn.Module
    reference: Runner
    encoder: TextEncoder
    labels: tuple[str, ...]
    problem_type: ProblemType
    pooling: str
    architecture: Mapping[str, Any]
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    equal_lengths: bool = False
    temperature: float | None = None

    def classifier(self, run: Runner | None = None) -> Classifier:
        """Return the reference as a classifier of texts, or ``run`` in its place."""
        return Classifier(
            self.encoder,
            run or self.reference,
            self.labels,
            self.problem_type,
            equal_lengths=self.equal_lengths,
            temperature=1.0 if self.temperature is None else self.temperature,
        )


def open_source(
    name: str,
    *,
    base: str | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> ExportSource:
    """Open a run's folder, a Hugging Face folder or hub id, or a PEFT adapter's folder.

    ``base`` is the model that an adapter belongs to, where the adapter does not say or it moved.
    ``max_length`` (tokens) cuts texts of a Hugging Face model; a run has its own.
    """
    folder, kind = Path(name), detect(name, hub=True)
    if kind == "bundle":
        raise InputError(
            f"{name} is a bundle, exported already; give the run or the model that it came from."
        )
    if kind == "run":
        return _run(folder)
    if kind == "hub id" and name != MINILM:
        remedy = "give a run, a Hugging Face folder or adapter, or a hub id and a network"
        folder = fetch(name, "source", trust_remote_code=trust_remote_code, remedy=remedy)
        kind = detect(folder)
    if kind == "adapter":
        return _adapter(name, folder, base, max_length, trust_remote_code)
    if base is not None:
        raise InputError(f"--base goes with a PEFT adapter, and {name} is none; leave it out.")
    loaded = hub_classifier.load(name, max_length=max_length, trust_remote_code=trust_remote_code)
    return from_transformers(loaded, {"kind": "classifier", "backbone": Path(name).name})


def _run(folder: Path) -> ExportSource:
    loaded = checkpoint.load(folder)
    config = loaded.checkpoint.model
    if config.backbone is not None:
        architecture = dict(config.backbone.architecture)
    elif config.text_cnn is not None:
        architecture = {"model_type": "trainkit-phrases", **msgspec.to_builtins(config.text_cnn)}
    else:
        architecture = {
            "model_type": "trainkit-scratch",
            **msgspec.to_builtins(config.transformer),
        }
    facts = {
        "kind": config.kind,
        # The name alone: a backbone's folder is this machine's business.
        "backbone": Path(config.backbone.name).name if config.backbone else None,
        "weights_sha256": loaded.checkpoint.weights_facts.sha256,
        "seed": loaded.checkpoint.seed,
        "epoch": loaded.checkpoint.epoch,
        "metrics": loaded.checkpoint.metrics,
        "versions": {"trainkit": loaded.checkpoint.versions["trainkit"]} | _versions(),
        "padded_because": loaded.model.padded_because,
    }
    return ExportSource(
        model=loaded.model,
        reference=torch_runner(loaded.model),
        encoder=loaded.encoder,
        labels=config.labels,
        problem_type="single_label_classification",
        pooling=loaded.model.pooling or OWN_HEAD,
        architecture=architecture,
        facts=facts,
        temperature=loaded.checkpoint.temperature,
    )


def from_transformers(loaded: HubClassifier, facts: dict[str, Any]) -> ExportSource:
    """Return the source of a Hugging Face classifier; ``facts`` name its kind and backbone."""
    return ExportSource(
        model=loaded.model,
        reference=torch_runner(loaded.reference),
        encoder=loaded.encoder,
        labels=loaded.labels,
        problem_type=loaded.problem_type,
        pooling=OWN_HEAD,
        architecture=loaded.architecture,
        facts=facts
        | {
            "weights_sha256": loaded.fingerprint,
            "versions": {"trainkit": __version__} | _versions(),
            "padded_because": loaded.padded_because,
        },
    )


def _adapter(
    name: str, folder: Path, base: str | None, max_length: int | None, trust_remote_code: bool
) -> ExportSource:
    adapted = load_adapter(name, base, trust_remote_code=trust_remote_code)
    own_tokenizer = (folder / "tokenizer.json").is_file()
    encoder = backbone.load_tokenizer(
        folder if own_tokenizer else adapted.base_folder,
        adapted.model,
        max_length=max_length,
        reserved=adapted.virtual_tokens,
        token_types=hub_classifier.takes_token_types(adapted.model),
        trust_remote_code=trust_remote_code,
    )
    backbone.check_vocabulary(adapted.base_name, encoder.tokenizer, adapted.model)
    hub_classifier.complete_padding(adapted.model, encoder.pad_id, adapted.base_name)
    loaded = hub_classifier.build(adapted.model, adapted.reference, encoder, adapted.padded_because)
    sample = [example.text for example in load_sample()[:EFFECT_TEXTS]]
    facts = {
        "kind": adapted.kind,
        "backbone": Path(adapted.base_name).name,
        "adapter": {
            "trained_parameters": adapted.trained_parameters,
            "virtual_tokens": adapted.virtual_tokens,
            **adapter_effect(adapted, encoder.encode(sample)),
        },
    }
    return from_transformers(loaded, facts)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {package: metadata.version(package) for package in packages}
