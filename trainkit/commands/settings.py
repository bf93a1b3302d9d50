"""The options of ``trainkit train`` and ``tune``: every setting of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from trainkit.commands.options import option, options_of
from trainkit.trainer.config import DEFAULTS, TrainConfig
from trainkit.trainer.run_config import ModelSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def _defaults() -> dict[str, str]:
    """Return the default of each setting in words; if kinds of models differ, one for each."""
    fields = {field.name: field.default for field in msgspec.structs.fields(ModelSpec)}
    words = {
        name: str(value)
        for name, value in fields.items()
        if value not in (None, False, msgspec.NODEFAULT)
    }
    for name in TrainConfig.__struct_fields__:
        of_kinds = {kind: getattr(config, name) for kind, config in DEFAULTS.items()}
        if len(set(of_kinds.values())) > 1:
            words[name] = ", ".join(f"{kind} {value:g}" for kind, value in of_kinds.items())
        elif (value := of_kinds["simple"]) is not False:
            words[name] = f"{value:g}" if isinstance(value, float) else str(value)
    return words


def setting_options(function: Function) -> Function:
    """Add an option for every setting of a training, and ``--config``."""
    model, training, defaults = "Model", "Training", _defaults()
    function = option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file with settings; options win over it.",
        group=training,
    )(function)
    function = options_of(TrainConfig, group=training, defaults=defaults)(function)
    return options_of(ModelSpec, group=model, defaults=defaults)(function)
