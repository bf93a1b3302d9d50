"""Settings of a training in a TOML file: read with the options given beside it, written for a run.

The keys are the options' names with underscores, all at the top level. What neither the file nor
the options say has the default of its kind of model.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trainkit.models.config import MINILM
from trainkit.serve.errors import InputError
from trainkit.serve.fields import value_faults
from trainkit.trainer.config import DEFAULTS, TrainConfig
from trainkit.trainer.run_config import ModelSpec

RUN = "run"  # a table of a run's own file, which is not a setting
MODEL = "model"  # ModelSpec.kind, by its option's name

_model = {
    MODEL if field.name == "kind" else field.name: field
    for field in msgspec.structs.fields(ModelSpec)
}
FIELDS = _model | {field.name: field for field in msgspec.structs.fields(TrainConfig)}


def resolve(given: Mapping[str, Any], file: Path | None = None) -> tuple[ModelSpec, TrainConfig]:
    """Return the settings of ``file`` with ``given``, which win, and the defaults.

    Raises ``InputError`` if no kind of model is named, or a value does not work.
    """
    settings = ({} if file is None else read(file)) | dict(given)
    if MODEL not in settings:
        where = "" if file is None else f", or model in {file}"
        raise InputError(f"no kind of model is named: give --model{where}.")
    kind = settings[MODEL]
    spec = {name: settings[name] for name in _model if name in settings and name != MODEL}
    if Path(home := spec.get("backbone") or "").is_dir() and home not in ("", MINILM):
        spec["backbone"] = str(Path(home).resolve())  # a run goes on from any working directory
    training = {name: value for name, value in settings.items() if name not in _model}
    try:
        return (
            ModelSpec(kind=kind, **spec),
            msgspec.structs.replace(DEFAULTS[kind], **training),
        )
    except InputError as error:
        if file is None:
            raise
        raise InputError(f"{file}, with the options given beside it: {error}") from None


def check_effect(given: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise ``InputError`` for an option without effect; a file's may be of another kind."""
    if "prefix_length" in given and spec.kind != "prefix":
        raise InputError(
            f"--prefix-length goes with --model prefix, not {spec.kind}; leave it out."
        )
    if "min_count" in given and spec.backbone is not None:
        raise InputError("--min-count is of a model from scratch: a backbone has its own words.")


def read(file: Path) -> dict[str, Any]:
    """Return the settings of a TOML file; ``InputError`` names every key that is wrong in it."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}); check the path that --config names."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} is not TOML ({error}); expected lines such as: learning_rate = 1e-3"
        ) from None
    content.pop(RUN, None)
    faults, settings = [], {}
    for key, value in content.items():
        if key not in FIELDS:
            faults.append(_unknown(key))
            continue
        if wrong := list(value_faults(key, FIELDS[key].type, value)):
            faults += wrong
        else:
            settings[key] = msgspec.convert(value, FIELDS[key].type)
    if faults:
        raise InputError(f"{file}: {'; '.join(faults)}.")
    return settings


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, FIELDS, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(FIELDS)}"
    return f"there is no setting {key!r} ({remedy})"


def by_struct(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the fields of a ``ModelSpec`` under "model", those of a ``TrainConfig`` under
    "training"."""
    fields: dict[str, dict[str, Any]] = {"model": {}, "training": {}}
    for name, value in settings.items():
        fields["model" if name in _model else "training"][name] = value
    fields["model"]["kind"] = fields["model"].pop(MODEL, None)
    return fields


def to_toml(spec: ModelSpec, config: TrainConfig) -> bytes:
    """Return every setting that has a value as the content of a file that :func:`read` takes."""
    settings = {MODEL: spec.kind}
    for struct in (spec, config):
        for name in struct.__struct_fields__:
            value = getattr(struct, name)
            if name != "kind" and value is not None:
                settings[name] = value
    import tomli_w  # of the extra `train`; reading settings needs only the base install

    return tomli_w.dumps(settings).encode()
