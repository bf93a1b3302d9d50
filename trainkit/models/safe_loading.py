"""Untrusted models: folders and hub ids are checked here before any library reads them.

Nothing in a checked folder is executed: no code of its own (``auto_map``, attention kernels from
the hub) unless the user trusts it, no pickle but one of plain tensors, no tokenizer in a pickle,
and no file that is read from outside the folder.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub
import msgspec
import torch

from trainkit.serve.errors import InputError, first_line

HUB_TIMEOUT_S = 10

# All that a text classifier or an adapter is read from. Weights come in one of two ways: pickles
# are only downloaded where there is no other.
FILES = ["*.json", "*.txt", "*.model", "*.py", "*.safetensors"]
PICKLED_WEIGHTS = ["pytorch_model*.bin", "adapter_model.bin"]

CONFIGURATIONS = ("config.json", "tokenizer_config.json", "adapter_config.json")
# transformers loads an attention or experts "implementation" with a slash in it from the hub, as
# compiled code, wherever the configuration names one.
KERNELS = re.compile(r"(attn|experts)_implementation")
# What Transformer-XL and many a research repository keep their vocabulary in.
TOKENIZER_PICKLE = re.compile(
    r"(tokenizer|vocab|vocabulary|merges|corpus)\.(pkl|pickle|joblib|dill|bin|pt|pth)", re.I
)


def fetch(
    name: str,
    what: str = "model",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    remedy: str = "give a Hugging Face folder, or a hub id and a network",
) -> Path:
    """Return the checked folder that ``name``, a folder or a hub id, stands for.

    A hub id is downloaded into the hub's cache, without its subfolders, and is then a folder like
    any other. Load from what comes back, not from ``name``, and pass the same
    ``trust_remote_code``, True or False: left out, transformers asks on the terminal.
    ``what`` names the thing in the sentence of an ``InputError``, ``remedy`` says what to do where
    it is nowhere.
    """
    folder = Path(name)
    if not name or not folder.is_dir():  # Path("") is the working directory
        folder = _download(name, what, revision, remedy)
    check_folder(folder, trust_remote_code=trust_remote_code)
    return folder


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder with anything in it that would be executed, or read from elsewhere.

    ``InputError`` for the first of: a link that leaves the folder (files are what a user
    looks through, copies and deletes; only the hub's own cache may link to its blobs), code to run
    without ``trust_remote_code``, a shard list that names files elsewhere, weights in a pickle that
    holds more than tensors, a pickled tokenizer. A Trainer's ``optimizer.pt`` and
    ``training_args.bin`` are pickles too; nothing reads them, so they may stay.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a directory; give a Hugging Face folder or a hub id.")
    for path in sorted(folder.iterdir()):
        _check_is_inside(path, folder)
    for name in CONFIGURATIONS:
        if (folder / name).exists():
            _check_configuration(folder / name, trust_remote_code)
    for path in _pickled_weights(folder):
        _check_is_plain(path)
    _check_tokenizer(folder)


def _download(name: str, what: str, revision: str | None, remedy: str) -> Path:
    """Fetch a hub id into the cache; ask once first: a download retries for half a minute."""
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
        adapter = huggingface_hub.try_to_load_from_cache(
            name, "adapter_config.json", revision=revision
        )
        if cached is None and adapter is None:
            huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        folder = _snapshot(name, revision, FILES)
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(name, revision, FILES + PICKLED_WEIGHTS)
    except Exception as error:  # each version of the hub's client brings its own HTTP library
        raise InputError(
            f"{what} {name!r} is not a directory, and was not found on the hub "
            f"({first_line(error)}); {remedy}."
        ) from None
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            etag_timeout=HUB_TIMEOUT_S,
        )
    )


def _check_is_inside(path: Path, folder: Path) -> None:
    """Refuse what is not the folder's own: links out of it, pipes, devices."""
    inside, target = folder.resolve(), path.resolve()
    homes = [inside]
    if inside.parent.name == "snapshots":  # the hub's cache: snapshots/REVISION beside blobs
        homes.append(inside.parent.parent / "blobs")
    if path.is_symlink() and not any(target.is_relative_to(home) for home in homes):
        raise InputError(
            f"{str(path)!r} is a link to a file outside of its folder and is not followed; "
            "put a copy of the file in its place."
        )
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{str(path)!r} is neither a file nor a folder; remove it.")


def _check_configuration(path: Path, trust_remote_code: bool) -> None:
    """Refuse code that a JSON file asks for, at any depth, and weights that it has elsewhere."""
    for key, value in _settings(_json(path)):
        if key == "transformers_weights" and value and not _is_plain_name(value):
            raise InputError(f"'{path}' takes its weights from {value!r}, outside of its folder.")
        runs_code = (key == "auto_map" and value) or (
            KERNELS.search(key) is not None and "/" in str(value)
        )
        if runs_code and not trust_remote_code:
            raise InputError(
                f"'{path}' asks to run code that came with the model ('{key}'), which is not done; "
                "read that code, then give --trust-remote-code if you trust its author."
            )
        if key == "megatron_config" and value:  # names a module, which PEFT then imports
            raise InputError(f"'{path}' needs Megatron, which trainkit does not load.")


def _settings(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of a JSON document, nested ones too."""
    if isinstance(document, dict):
        yield from document.items()
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            yield from _settings(item)


def _json(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except (OSError, RecursionError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise InputError(
            f"'{path}' is not a JSON file ({error}); bring the original back."
        ) from None


def _is_plain_name(name: object) -> bool:
    """Tell whether ``name`` is that of a file directly in the folder, on any system."""
    return isinstance(name, str) and name not in ("", "..") and not re.search(r"[/\\:\0]", name)


def _pickled_weights(folder: Path) -> list[Path]:
    """List the pickles that transformers and PEFT read weights from, in parts or in one."""
    names = {"pytorch_model.bin", "adapter_model.bin"}
    for index in sorted(folder.glob("*.index.json")):
        names |= {name for name in _shards(index) if PurePath(name).suffix != ".safetensors"}
    return sorted(folder / name for name in names if (folder / name).exists())


def _shards(index: Path) -> set[str]:
    """Return the file names of a shard list; transformers would join any path to the folder's."""
    document = _json(index)
    shards = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(shards, dict):
        raise InputError(f"'{index}' has no weight_map; bring the original back.")
    for name in shards.values():
        if not _is_plain_name(name):
            raise InputError(f"'{index}' lists weights in {name!r}, outside of its folder.")
    return set(shards.values())


def _check_is_plain(path: Path) -> None:
    """Refuse a pickle of anything but tensors, without running it: torch reads it by a short list.

    The tensors themselves are left on disk. Of the formats before 2020 torch refuses tar files and
    TorchScript archives, which it could only read by running them.
    """
    try:
        state = torch.load(
            path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path) or None
        )
    except Exception as error:  # junk raises anything, from EOFError to KeyError
        called = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        reason = f"it calls {called[1]}" if called else "it is no plain PyTorch file of tensors"
        raise InputError(
            f"'{path}' is a pickle and was not loaded: {reason}, and to load it could run "
            "anything; ask its author for .safetensors."
        ) from None
    if not isinstance(state, Mapping) or not all(torch.is_tensor(t) for t in state.values()):
        raise InputError(
            f"'{path}' holds more than named tensors; ask its author for .safetensors."
        )


def _check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer in a pickle; beside a ``tokenizer.json`` nothing reads it."""
    pickles = [path for path in sorted(folder.iterdir()) if TOKENIZER_PICKLE.fullmatch(path.name)]
    if pickles and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"'{pickles[0]}' is a tokenizer in a pickle, which could run anything and is not "
            "loaded; ask its author for tokenizer.json."
        )
