"""What a given folder or name is: a bundle, a run, a PEFT adapter or a Hugging Face model.

Looks at file names only, so that it imports neither torch nor transformers.
"""

from pathlib import Path
from typing import Literal

from trainkit.serve.bundle import MANIFEST
from trainkit.serve.errors import InputError

CHECKPOINT = "checkpoint.json"
ADAPTER_CONFIG = "adapter_config.json"
HUB_CONFIG = "config.json"

SourceKind = Literal["bundle", "run", "adapter", "classifier", "hub id"]

# In this order: a bundle and some adapters have a config.json too.
MARKERS: dict[SourceKind, str] = {
    "bundle": MANIFEST,
    "run": CHECKPOINT,
    "adapter": ADAPTER_CONFIG,
    "classifier": HUB_CONFIG,
}


def detect(source: Path | str, *, hub: bool = False) -> SourceKind:
    """Return what ``source`` is by the files in it; a "classifier" is a Hugging Face folder.

    With ``hub``, a name that is not a folder and does not look like a path is a "hub id". Raises
    ``InputError`` if the source is none of them.
    """
    folder = Path(source)
    for kind, marker in MARKERS.items():
        if (folder / marker).is_file():
            return kind
    if hub and not folder.is_dir() and not _is_path(str(source)):
        return "hub id"
    raise InputError(
        f"{source} is neither a bundle (no {MANIFEST}) nor a run (no {CHECKPOINT}) nor a PEFT "
        f"adapter (no {ADAPTER_CONFIG}) nor a Hugging Face folder (no {HUB_CONFIG}); give the "
        "folder that train or export named, or train a run with: trainkit train --data sample"
    )


def is_kind(source: Path | str, kind: SourceKind) -> bool:
    """Tell whether ``source`` is of this kind; False for a folder that is nothing known."""
    try:
        return detect(source) == kind
    except InputError:
        return False


def _is_path(name: str) -> bool:
    """Tell a path from a hub id, NAME or OWNER/NAME, so that no path is looked up on the hub."""
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith((".", "~", "runs/"))
        or len(path.parts) > 2
        or (path.parent != Path() and path.parent.is_dir())
    )
