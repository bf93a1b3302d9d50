"""What a run was started with, kept in its folder as ``config.toml``: settings and data.

The settings stand at the top level, as ``trainkit train --config`` reads them. The table ``[run]``
is for ``--resume``: where the data is, its hash, and a checksum of everything.
"""

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from trainkit.data.splits import Splits
from trainkit.models.sources import is_kind
from trainkit.serve.errors import InputError
from trainkit.serve.files import Checksummed, write_atomically
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run_config import DataSpec, ModelSpec
from trainkit.trainer.settings import RUN, by_struct, to_toml

CONFIG = "config.toml"


class RunConfig(Checksummed, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a run's ``config.toml``; ``source`` is None if the data was in memory."""

    model: ModelSpec
    training: TrainConfig
    data_sha256: str
    source: DataSpec | None = None


def write(folder: Path, config: RunConfig) -> None:
    """Write ``config`` into the run's folder."""
    config = config.with_checksum()
    run = {"sha256": config.sha256, "data_sha256": config.data_sha256}
    if config.source is not None:
        run["source"] = _without_none(msgspec.to_builtins(config.source))
    import tomli_w  # of the extra `train`; reading a run's folder needs only the base install

    content = to_toml(config.model, config.training) + tomli_w.dumps({RUN: run}).encode()
    write_atomically(folder / CONFIG, content)


def _without_none(value: Any) -> Any:
    """Drop what TOML cannot say."""
    if not isinstance(value, dict):
        return value
    return {name: _without_none(part) for name, part in value.items() if part is not None}


def read(folder: Path) -> RunConfig:
    """Read a run's ``config.toml``; raises ``InputError`` if it is missing, damaged or changed."""
    path = folder / CONFIG
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        run = content.pop(RUN)
        config = msgspec.convert({**by_struct(content), **run}, RunConfig)
    except OSError as error:
        raise InputError(
            f"{folder} is not a run that can be resumed: {path.name} cannot be read there "
            f"({error.strerror})."
        ) from None
    except KeyError:
        raise InputError(
            f"{folder} is not a run that can be resumed: {path.name} has no table [{RUN}]."
        ) from None
    except (ValueError, TypeError, msgspec.MsgspecError, InputError) as error:
        raise InputError(f"{path} is damaged ({error}); train again.") from None
    if not config.is_valid:
        raise InputError(
            f"{path} was changed since the training began; train again with: trainkit train "
            f"--config {path}"
        )
    return config


def check_resumed(folder: Path, config: RunConfig) -> None:
    """Raise ``InputError`` if ``folder`` holds a run of other settings or data than ``config``."""
    earlier = read(folder)
    if earlier.data_sha256 != config.data_sha256:
        raise InputError(
            f"the data is not what {folder} was trained on; give that data, or train again."
        )
    changed = [
        f"{name} was {before!r} and is {now!r}"
        for mine, theirs in ((config.model, earlier.model), (config.training, earlier.training))
        for name in mine.__struct_fields__
        if (before := getattr(theirs, name)) != (now := getattr(mine, name))
    ]
    if changed:
        raise InputError(
            f"{folder} can only be resumed with the settings it was started with: "
            f"{'; '.join(changed)}."
        )


def check_own_test(folder: Path, data: str, split: str | None) -> None:
    """Raise ``InputError`` if a test split of ``data`` would hold texts that a run was trained on.

    That is so for a run with a test file of its own. ``folder`` is a run, or lies in one as its
    bundles do; ``split`` is what is scored of ``data``.
    """
    for run in (folder, folder.resolve().parent):
        # By the checkpoint: a service's folder may have a config.toml of its own.
        own = read(run).source if is_kind(run, "run") and (run / CONFIG).is_file() else None
        is_split_off = split == "test" or (split is None and not Path(data).is_file())
        same = own is not None and own.data in (data, str(Path(data).resolve()))
        if own is not None and own.test is not None and same and is_split_off:
            raise InputError(
                f"{run} was trained on all of {data} (its test set is {own.test}), so a split of "
                f"{data} would contain training texts; use --data {own.test}."
            )


def fingerprint(splits: Splits) -> str:
    """Hash every text and label of the three splits, in their order."""
    content = [
        [(example.text, example.label) for example in split]
        for split in (splits.train, splits.valid, splits.test)
    ]
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()
