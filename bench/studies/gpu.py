"""Every CUDA path on a machine with an NVIDIA GPU: checked first, then timed, in ten minutes.

``make gpu`` or ``python -m trainkit.bench.studies.gpu --out gpu.json``. Trains a model on the GPU
in fp32 and bf16, exports it, and compares with the logits of the CPU: torch in fp32, bf16 and fp16,
ONNX Runtime's CUDA provider on the fp32 and fp16 bundles, and the same with I/O binding. Then the
GPU's rows of a benchmark are measured. ``--device cpu`` runs the same steps without a GPU.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

import trainkit
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.serve.errors import CheckFailedError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
RUNTIMES = {"cpu": ("eager", "onnx"), "cuda": ("eager-cuda", "onnx-cuda")}
# Largest relative error (RMSE by the logits' standard deviation) of each precision.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


class Checked(NamedTuple):
    """One path: its error, and the share of texts with the CPU's label."""

    path: str
    precision: str
    relative_rmse: float
    label_agreement: float

    @property
    def passed(self) -> bool:
        """Tell whether it computed what the CPU computes, as closely as its precision can."""
        limit = LIMITS[self.precision]
        return self.relative_rmse <= limit and self.label_agreement >= 1 - limit


@click.command(cls=ErrorReportingCommand)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--model", default="simple", show_default=True, help="Kind of model to train.")
@click.option("--backbone", help="Pretrained encoder of the model.")
@click.option("--epochs", default=1, show_default=True, help="Passes over the training texts.")
@click.option("--min-seconds", default=5.0, show_default=True, help="Seconds per engine.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the benchmark.")
def main(
    device: str,
    model: str,
    backbone: str | None,
    epochs: int,
    min_seconds: float,
    out: Path | None,
) -> None:
    """Check and time every CUDA path; without a GPU there is nothing to do, and that is success."""
    if device == "cuda" and shutil.which("nvidia-smi") is None:
        click.echo("gpu: skipped, since this machine has no NVIDIA GPU (no nvidia-smi)")
        return
    # Else NVIDIA's libraries round the factors of float32 products to 11 bits.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        options = {"model": model, "backbone": backbone, "epochs": epochs, "device": device}
        run = trainkit.train("sample", runs=runs, name="fp32", **options)  # type: ignore[arg-type]
        trainkit.train("sample", runs=runs, name="bf16", precision="bf16", **options)  # type: ignore[arg-type]
        click.echo(f"trained on {device} in fp32 and bf16")
        bundles = {
            precision: run.export("onnx", precision=precision) for precision in ("fp32", "fp16")
        }
        failed = []
        for checked in _checks(run, bundles, device):
            verdict = "ok" if checked.passed else "FAILED"
            click.echo(
                f"{checked.path}, {checked.precision}: relative error {checked.relative_rmse:.1e}, "
                f"labels agree on {100 * checked.label_agreement:.1f}%: {verdict}"
            )
            failed += [] if checked.passed else [f"{checked.path} in {checked.precision}"]
        if failed:
            raise CheckFailedError(f"not the CPU's logits: {', '.join(failed)}.")
        torch_runtime, onnx_runtime = RUNTIMES[device]
        result = trainkit.benchmark(
            [
                f"{torch_runtime}:{run.folder}",
                *(f"{onnx_runtime}:{bundle.folder}" for bundle in bundles.values()),
            ],
            batch_sizes=(1, 32, 128),
            min_seconds=min_seconds,
            min_rounds=3,
            command=["python", "-m", "trainkit.bench.studies.gpu", *sys.argv[1:]],
        )
        result.check()
        if out is not None:
            result.save(out)
        from trainkit.bench.report.tables import markdown

        click.echo(markdown(result.result))


def _checks(
    run: trainkit.Run, bundles: "dict[str, trainkit.Bundle]", device: str
) -> Iterator[Checked]:
    from trainkit.data.splits import load_sample

    texts = [example.text for example in load_sample()[:256]]
    classifier = run.classifier()
    expected = classifier.logits(texts)
    batch = classifier.encoder.encode(texts)

    def checked(path: str, precision: str, logits: np.ndarray) -> Checked:
        error = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
        agreement = np.mean(logits.argmax(1) == expected.argmax(1))
        return Checked(path, precision, float(error), float(agreement))

    for precision, forward in _torch_forwards(run, device).items():
        yield checked("torch", precision, forward(batch))
    for precision, bundle in bundles.items():
        for path, logits in _onnx_logits(bundle, batch, device):
            yield checked(path, precision, logits)


def _torch_forwards(run: trainkit.Run, device: str) -> "dict[str, Callable[..., np.ndarray]]":
    import copy

    import torch

    module = copy.deepcopy(run.load().model).to(device).eval()
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

    def forward(dtype: "torch.dtype | None") -> "Callable[..., np.ndarray]":
        def compute(batch: "object") -> np.ndarray:
            inputs = [torch.from_numpy(a).to(device) for a in batch if a is not None]  # type: ignore[attr-defined]
            autocast = torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)
            with torch.inference_mode(), autocast:
                return np.asarray(module(*inputs).float().cpu().numpy())

        return compute

    return {precision: forward(dtype) for precision, dtype in dtypes.items()}


def _onnx_logits(
    bundle: trainkit.Bundle, batch: object, device: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the logits of ONNX Runtime, of a plain run and of one whose tensors stay on device."""
    import onnxruntime as ort

    from trainkit.serve.formats import MODEL_FILES
    from trainkit.serve.onnx_session import onnx_runner

    path = bundle.folder / MODEL_FILES[bundle.manifest.format]
    provider = PROVIDERS[device]
    yield provider, onnx_runner(path, providers=(provider,))(batch)  # type: ignore[arg-type]
    session = ort.InferenceSession(str(path), providers=[provider])
    binding = session.io_binding()
    for tensor in session.get_inputs():
        value = ort.OrtValue.ortvalue_from_numpy(getattr(batch, tensor.name), device, 0)
        binding.bind_ortvalue_input(tensor.name, value)
    binding.bind_output("logits", device)
    session.run_with_iobinding(binding)
    yield f"{provider} with I/O binding", binding.copy_outputs_to_cpu()[0]


if __name__ == "__main__":
    main()
