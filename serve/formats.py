"""What a bundle's model may be: its format and its precision. Imports nothing that computes."""

from typing import Literal, TypeAlias

Format: TypeAlias = Literal["onnx", "torchscript", "pt2", "aoti"]
Precision: TypeAlias = Literal["fp32", "fp16", "int8"]

MODEL_FILES: dict[Format, str] = {
    "onnx": "model.onnx",
    "torchscript": "model.pt",
    "pt2": "model.pt2",
    "aoti": "model.aoti.pt2",
}
