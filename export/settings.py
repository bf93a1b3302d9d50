"""How to export: format, precision, opset, and what a lower precision may cost."""

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from trainkit.serve import fields
from trainkit.serve.errors import InputError
from trainkit.serve.formats import Format, Precision

if TYPE_CHECKING:
    from trainkit.export.accuracy_gate import AccuracyLimits
    from trainkit.serve.postprocess import ProblemType

OPSET = 23  # the first with a standard Attention operator, which SDPA becomes
OPSETS = range(18, 24)


class ExportSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to export: format, precision and graph, and the limits of the accuracy gate.

    In fp32 every decision on the user's texts must be the same; the limits do not apply.
    """

    format: Annotated[
        Format,
        Meta(
            description="pt2 is a torch.export program, aoti machine code for this kind of "
            "processor."
        ),
    ] = "onnx"
    precision: Annotated[
        Precision, Meta(description="Below fp32 for ONNX only; int8 needs labelled texts.")
    ] = "fp32"
    max_accuracy_drop: Annotated[
        float,
        Meta(
            ge=0,
            description="Percentage points of accuracy that a precision below fp32 may cost on the "
            "labelled texts.",
        ),
    ] = 0.5
    min_label_agreement: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="Percentage of the labelled texts that must keep their label in a "
            "precision below fp32.",
        ),
    ] = 97.0
    opset: Annotated[
        int, Meta(ge=OPSETS[0], le=OPSETS[-1], description="ONNX opset, 18 to 23.")
    ] = OPSET
    optimize: Annotated[
        bool,
        Meta(
            description="Leave the ONNX graph as PyTorch exported it.",
            extra={"option": "--no-optimize"},
        ),
    ] = True
    external_data: Annotated[
        bool,
        Meta(
            description="Write the ONNX weights to model.onnx.data, which processes can map and "
            "share.",
        ),
    ] = False

    def __post_init__(self) -> None:
        faults = list(fields.faults(self))
        if self.format != "onnx" and self.precision != "fp32":
            faults.append(f"--precision {self.precision} goes with --format onnx alone")
        if self.format != "onnx" and self.opset != OPSET:
            faults.append("--opset goes with --format onnx alone")
        if self.format != "onnx" and self.external_data:
            faults.append("--external-data goes with --format onnx or triton alone")
        if faults:
            raise InputError("; ".join(faults) + ".")

    def limits(self) -> "AccuracyLimits":
        """Return the limits of the accuracy gate."""
        from trainkit.export.accuracy_gate import AccuracyLimits

        if self.precision == "fp32":
            return AccuracyLimits(max_drop_points=0, min_label_agreement=1)
        return AccuracyLimits(
            max_drop_points=self.max_accuracy_drop,
            min_label_agreement=self.min_label_agreement / 100,
        )


def check_settings(settings: ExportSettings, problem_type: "ProblemType", *, data: bool) -> None:
    """Raise InputError if int8 is requested and its cost cannot be measured."""
    if settings.precision != "int8":
        return
    if not data:
        raise InputError("int8 needs labelled texts to judge what it costs; give --data FILE.")
    if problem_type == "regression":
        raise InputError(
            "int8 is judged by its decisions, and a regression has none; use --precision fp16."
        )
