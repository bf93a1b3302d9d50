"""What others make of a Hugging Face folder: exporters and optimisers, as their users run them.

A conversion writes to a scratch folder that is removed once the model is open. Optimum and
sentence-transformers need an older transformers than trainkit and run in environments of their own,
which ``make peers`` creates (:func:`trainkit.bench.engines.registry.peers_folder`).
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from trainkit.bench.engines.base import Engine, EngineUnavailableError, limit_torch, versions_of
from trainkit.bench.engines.bundles import import_openvino, openvino_runner
from trainkit.bench.measure.procfs import processor_flags
from trainkit.serve.encoding import Batch, Text
from trainkit.serve.types import FloatArray, Runner

EXAMPLE = ("How far is it from Denver to Aspen ?", "Who was Galileo ?")

Level: TypeAlias = Literal["", "O2", "int8"]


def _optimum(source: Path, threads: int, level: Level = "") -> Engine:
    """Export with optimum-onnx; optimise for ONNX Runtime at O2, or quantize dynamically."""
    from optimum.onnxruntime import ORTModelForSequenceClassification

    options = _session_options(threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = ORTModelForSequenceClassification.from_pretrained(
            source, export=True, provider="CPUExecutionProvider", session_options=options
        )
        if level:
            file = _rewritten(model, level, Path(scratch))
            model = ORTModelForSequenceClassification.from_pretrained(
                scratch, file_name=file, provider="CPUExecutionProvider", session_options=options
            )

    def run(batch: Batch) -> FloatArray:
        logits: FloatArray = model(**batch.tensors()).logits
        return logits

    return Engine(
        f"optimum {level}".strip(),
        run,
        precision="int8" if level == "int8" else "fp32",
        versions=versions_of("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch"),
    )


def _rewritten(model: Any, level: Level, folder: Path) -> str:
    """Write a faster form of ``model`` beside its configuration; returns the file's name."""
    from optimum.onnxruntime import ORTOptimizer, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig

    if level == "O2":
        ORTOptimizer.from_pretrained(model).optimize(AutoOptimizationConfig.O2(), folder)
        return "model_optimized.onnx"
    vnni = "avx512_vnni" in processor_flags()
    config = AutoQuantizationConfig.avx512_vnni if vnni else AutoQuantizationConfig.avx2
    ORTQuantizer.from_pretrained(model).quantize(config(is_static=False), folder)
    return "model_quantized.onnx"


def _sentence_transformers(source: Path, threads: int) -> Engine:
    """Open its ONNX backend, which tokenizes; texts are cut where its own tokenizer cuts them."""
    limit_torch(threads)
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        str(source),
        backend="onnx",
        device="cpu",
        model_kwargs={
            "export": True,
            "provider": "CPUExecutionProvider",
            "session_options": _session_options(threads),
        },
    )

    def classify(texts: Sequence[Text]) -> FloatArray:
        # What `predict` does with a batch; itself it takes a list of single texts for one pair.
        with torch.inference_mode():
            scores: FloatArray = model(model.preprocess(list(texts)))["scores"].numpy()
        return scores

    return Engine(
        "sentence-transformers ONNX",
        None,
        classify,
        versions=versions_of(
            "sentence-transformers", "optimum-onnx", "transformers", "onnxruntime"
        ),
    )


def _transformers_exporters(source: Path, threads: int) -> Engine:
    """Export with ``transformers.exporters`` and its fusions for ONNX Runtime's CPU provider."""
    try:
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError:
        found = versions_of("transformers")["transformers"]
        raise EngineUnavailableError(
            f"transformers {found} has no exporters; run: pip install 'transformers>=5.13'"
        ) from None
    model, example = _loaded(source)
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        OnnxExporter().export(model, example, config=config).save_pretrained(scratch)
        return _on_onnxruntime("transformers exporters", Path(scratch) / "model.onnx", threads)


def _ort_optimizer(source: Path, threads: int) -> Engine:
    """Export plainly, then fuse with ``onnxruntime.transformers``.

    By way of TorchScript and eager attention: its patterns for attention are of that time, and find
    none in what torch.export or fused attention leave.
    """
    import torch
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    from trainkit.models.hub_classifier import Forward

    model, example = _loaded(source, attn_implementation="eager")
    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)  # by default it counts the tokens: right padding only
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        torch.onnx.export(
            Forward(model),
            tuple(example.values()),
            str(file),
            input_names=list(example),
            output_names=["logits"],
            dynamic_axes={name: {0: "B", 1: "S"} for name in example} | {"logits": {0: "B"}},
            opset_version=17,
            dynamo=False,
        )
        optimized = optimize_model(
            str(file),
            "bert",
            num_heads=getattr(model.config, "num_attention_heads", 0),
            hidden_size=model.config.hidden_size,
            optimization_options=options,
        )
        optimized.save_model_to_file(str(file))
        return _on_onnxruntime("ONNX Runtime optimizer", file, threads)


def _openvino_converter(source: Path, threads: int) -> Engine:
    """Convert the PyTorch model with OpenVINO's own converter, without ONNX."""
    limit_torch(threads)
    openvino = import_openvino()
    model, example = _loaded(source)
    any_shape = {name: openvino.PartialShape([-1, -1]) for name in example}  # B, S
    converted = openvino.convert_model(model, example_input=example, input=any_shape)
    return Engine(
        "OpenVINO converter",
        openvino_runner(converted, threads),
        versions=versions_of("openvino", "transformers", "torch"),
    )


def _loaded(source: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Load Hugging Face's own model, and an example of its inputs by name."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from trainkit.models import backbone
    from trainkit.models.hub_classifier import takes_token_types
    from trainkit.models.loading import quiet

    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, **settings
        ).eval()
    encoder = backbone.load_tokenizer(source, model, token_types=takes_token_types(model))
    batch = encoder.encode(EXAMPLE)
    return model, {name: torch.from_numpy(array) for name, array in batch.tensors().items()}


def _on_onnxruntime(title: str, file: Path, threads: int) -> Engine:
    from trainkit.serve.onnx_session import onnx_runner

    run: Runner = onnx_runner(file, threads=threads)
    return Engine(title, run, versions=versions_of("transformers", "onnxruntime", "torch"))


def _session_options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return options


CONVERSIONS: dict[str, Callable[[Path, int], Engine]] = {
    "optimum": _optimum,
    "optimum-o2": partial(_optimum, level="O2"),
    "optimum-int8": partial(_optimum, level="int8"),
    "sentence-transformers": _sentence_transformers,
    "transformers-exporters": _transformers_exporters,
    "ort-optimizer": _ort_optimizer,
    "openvino-converter": _openvino_converter,
}
