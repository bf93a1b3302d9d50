"""The floating-point operations that an encoder needs for texts without padding."""

from collections.abc import Mapping, Sequence
from typing import Any

# What a layer of these computes follows from three sizes. Others have gates, bottlenecks or
# attention of their own.
PLAIN = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
SCRATCH = "trainkit-scratch"


def useful_flop(architecture: Mapping[str, Any], lengths: Sequence[int]) -> float | None:
    """Return the operations of an encoder's layers for texts of these lengths, in tokens.

    A multiplication and an addition count as two. Embeddings, norms and the head are left out, and
    so is all padding. None where the architecture does not follow from its sizes, or transformers,
    which knows their defaults, is not installed.
    """
    sizes = _sizes(architecture)
    if sizes is None:
        return None
    layers, hidden, inner = sizes
    tokens, pairs = sum(lengths), sum(length * length for length in lengths)
    return float(layers * (2 * tokens * (4 * hidden**2 + 2 * hidden * inner) + 4 * pairs * hidden))


def _sizes(architecture: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the number of layers, the hidden size and the feed-forward's inner size."""
    kind = architecture.get("model_type")
    if kind == SCRATCH:
        names = ("layers", "hidden_size", "feed_forward_size")
        layers, hidden, inner = (architecture[name] for name in names)
        return layers, hidden, inner
    if kind not in PLAIN:
        return None
    try:
        from transformers import AutoConfig
    except ImportError:
        return None
    rest = {name: value for name, value in architecture.items() if name != "model_type"}
    config = AutoConfig.for_model(kind, **rest)
    inner = config.hidden_dim if kind == "distilbert" else config.intermediate_size
    return config.num_hidden_layers, config.hidden_size, inner
