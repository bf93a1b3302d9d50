"""PyTorch's runtimes, all on the same ``module(ids, mask[, types])`` without gradients.

PyTorch and transformers are imported where they are opened: a list of runtimes needs neither.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.bench.engines.base import (
    Engine,
    EngineUnavailableError,
    kind_of,
    limit_torch,
    versions_of,
)
from trainkit.serve.encoding import Batch, Text
from trainkit.serve.errors import InputError
from trainkit.serve.types import FloatArray, Runner

if TYPE_CHECKING:
    from torch import nn


def eager(source: Path, threads: int, device: str = "cpu") -> Engine:
    """Open the forward that trainkit runs and exports."""
    limit_torch(threads)
    if device == "cuda":
        _check_cuda()
    title = "PyTorch eager" if device == "cpu" else "PyTorch eager CUDA"
    return Engine(
        title,
        _module_runner(_packed(source), device),
        versions=versions_of("torch", "transformers"),
    )


def huggingface(source: Path, threads: int) -> Engine:
    """Open Hugging Face's own padded forward."""
    limit_torch(threads)
    return Engine(
        "Hugging Face eager",
        _module_runner(_padded(source)),
        versions=versions_of("torch", "transformers"),
    )


def compiled(source: Path, threads: int) -> Engine:
    """Compile Hugging Face's own forward where there is one, trainkit's for a run or an adapter."""
    import torch

    limit_torch(threads)
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        raise EngineUnavailableError(
            "torch.compile needs a C++ compiler; install g++ or clang"
        ) from None
    module = _padded(source) if kind_of(source) == "classifier" else _packed(source)
    return Engine(
        "torch.compile",
        _module_runner(torch.compile(module, dynamic=True)),
        versions=versions_of("torch", "transformers"),
    )


def _packed(source: Path) -> "nn.Module":
    """Load the forward that trainkit runs and exports."""
    from trainkit.export.source import open_source

    return open_source(str(source)).model


def _padded(source: Path) -> "nn.Module":
    """Load Hugging Face's own classifier as transformers gives it, all weights in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from trainkit.models.hub_classifier import Forward
    from trainkit.models.loading import quiet

    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    return Forward(model).eval()


def _module_runner(module: Any, device: str = "cpu") -> Runner:
    import torch

    module = module.to(device)

    def run(batch: Batch) -> FloatArray:
        with torch.inference_mode():
            logits = module(
                *(torch.from_numpy(array).to(device) for array in batch.tensors().values())
            )
            if device == "cuda":
                done = torch.cuda.Event()
                done.record()
                done.synchronize()
        array: FloatArray = logits.float().cpu().numpy()
        return array

    return run


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise EngineUnavailableError(
            f"torch {torch.__version__} finds no CUDA GPU; run it on a machine with one, with a "
            "CUDA build of torch"
        )


def pipeline(source: Path, threads: int) -> Engine:
    """Open ``transformers``' own pipeline, its scores left as logits."""
    limit_torch(threads)
    from transformers import AutoTokenizer
    from transformers import pipeline as transformers_pipeline

    from trainkit.models.backbone import load_tokenizer

    model: Any = _padded(source).model
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    if len(set(labels)) < len(labels):
        raise InputError(f"{source} gives two labels one name: a pipeline cannot tell them apart.")
    classify: Any = transformers_pipeline(
        "text-classification",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(source),
        device="cpu",
    )
    length = load_tokenizer(source, model).max_length

    def run(texts: Sequence[Text]) -> FloatArray:
        import numpy as np

        answers = classify(
            [
                one if isinstance(one, str) else {"text": one[0], "text_pair": one[1]}
                for one in texts
            ],
            function_to_apply="none",
            top_k=None,
            batch_size=len(texts),
            truncation=True,
            max_length=length,
        )
        by_label = [{one["label"]: one["score"] for one in answer} for answer in answers]
        return np.array([[row[label] for label in labels] for row in by_label], dtype=np.float32)

    return Engine("transformers pipeline", None, run, versions=versions_of("torch", "transformers"))
