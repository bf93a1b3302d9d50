"""Bundles to predictions, in your process: no torch, transformers or onnx."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.serve.classifier import Classifier, LabelScore, Prediction

__all__ = ["Classifier", "LabelScore", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): the errors beside it must not cost numpy and tokenizers."""
    if name in __all__:
        from trainkit.serve import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
