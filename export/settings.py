"""How to export: format, precision, opset, and what may change in a lower precision."""

import msgspec

from trainkit.export.precision.gate import Limits
from trainkit.serve.bundle import Format, Precision
from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import ProblemType

__all__ = ["OPSET", "OPSETS", "ExportSettings", "check_settings"]

OPSET = 23  # the first with a standard Attention operator, which SDPA becomes
OPSETS = range(18, 24)


class ExportSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to export.

    ``external_data`` puts an ONNX graph's weights into a file beside it, however few they are.
    ``max_accuracy_drop`` in percentage points and ``min_label_agreement`` in percent are the gate
    on the user's texts for precisions below fp32; in fp32 every decision must be the same.
    """

    format: Format = "onnx"
    precision: Precision = "fp32"
    opset: int = OPSET
    optimize: bool = True
    external_data: bool = False
    max_accuracy_drop: float = 0.5
    min_label_agreement: float = 97.0

    def __post_init__(self) -> None:
        faults = []
        if self.opset not in OPSETS:
            faults.append(f"--opset must be {OPSETS[0]} to {OPSETS[-1]}, not {self.opset}")
        if self.format != "onnx" and self.precision != "fp32":
            faults.append(f"--precision {self.precision} goes with --format onnx alone")
        if self.format != "onnx" and self.opset != OPSET:
            faults.append("--opset goes with --format onnx alone")
        if self.format != "onnx" and self.external_data:
            faults.append("--external-data goes with --format onnx or triton alone")
        if self.max_accuracy_drop < 0:
            faults.append(f"--max-accuracy-drop must be 0 or more, not {self.max_accuracy_drop:g}")
        if not 0 <= self.min_label_agreement <= 100:
            faults.append(
                f"--min-label-agreement must be 0 to 100, not {self.min_label_agreement:g}"
            )
        if faults:
            raise InputError("; ".join(faults) + ".")

    def limits(self) -> Limits:
        """Return what the gate lets through."""
        if self.precision == "fp32":
            return Limits(max_drop_points=0, min_label_agreement=1)
        return Limits(
            max_drop_points=self.max_accuracy_drop,
            min_label_agreement=self.min_label_agreement / 100,
        )


def check_settings(settings: ExportSettings, problem_type: ProblemType, *, data: bool) -> None:
    """Raise ``InputError`` where int8 is asked for and cannot be judged."""
    if settings.precision != "int8":
        return
    if not data:
        raise InputError("int8 needs labelled texts to judge what it costs; give --data FILE.")
    if problem_type == "regression":
        raise InputError(
            "int8 is judged by its decisions, and a regression has none; use --precision fp16."
        )
