"""The rewrites in their order."""

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from trainkit.export.rewrite.attention import fuse_attention
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.flatten import flatten_tokens
from trainkit.export.rewrite.fold import fold_constants
from trainkit.export.rewrite.narrow import narrow_last_layer
from trainkit.export.rewrite.strip import strip_metadata


class Rewrite(NamedTuple):
    """One rewrite: changes a graph in place and says what it did, or why not."""

    name: str
    apply: Callable[[ir.Model], RewriteResult]


REWRITES = (
    Rewrite("strip_metadata", strip_metadata),
    Rewrite("fold_constants", fold_constants),
    Rewrite("fuse_attention", fuse_attention),
    Rewrite("narrow_last_layer", narrow_last_layer),
    Rewrite("flatten_tokens", flatten_tokens),
)
