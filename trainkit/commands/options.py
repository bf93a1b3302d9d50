"""Options made from settings structs, in groups: type, range, default and help stand in the struct.

A field is ``Annotated[int, Meta(ge=1, description="...", extra={...})]``; ``extra`` may hold the
``option``'s name where it is not the field's, and its ``metavar``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click
import msgspec
from msgspec import inspect

from trainkit.cli_errors import ErrorReportingCommand
from trainkit.serve.errors import InputError
from trainkit.serve.fields import base_type, choices, value_faults

__all__ = ["Command", "Option", "command", "option", "options_of"]

Function = TypeVar("Function", bound=Callable[..., Any])
OTHER = "Options"


class Option(click.Option):
    """An option that knows its group, and the struct's field that it sets."""

    def __init__(
        self, names: Sequence[str], group: str = OTHER, field: Any = None, **settings: Any
    ) -> None:
        super().__init__(names, **settings)
        self.group = group
        self.field = field

    def faults(self, value: Any) -> list[str]:
        """Return a sentence for each way in which the value breaks the field's constraints."""
        if self.field is None or value is None:
            return []
        return list(value_faults(self.opts[0], self.field.type, value))


class Command(ErrorReportingCommand):
    """A command that lists its options in groups and checks them all before it runs."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups, that of ``--help`` last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", OTHER), []).append(record)
        for title in sorted(groups, key=lambda title: title == OTHER):
            with formatter.section(title):
                formatter.write_dl(groups[title])

    def check(self, context: click.Context) -> None:
        """Raise InputError that names every option whose value is out of range."""
        faults = [
            fault
            for option in self.params
            if isinstance(option, Option)
            for fault in option.faults(context.params.get(option.name or ""))
        ]
        if faults:
            raise InputError("; ".join(faults) + ".")


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """Declare a command whose options are checked and grouped."""
    return click.command(name, cls=Command)


def option(*names: str, group: str = OTHER, **settings: Any) -> Callable[[Function], Function]:
    """Declare one option of a group; its default is shown."""
    settings.setdefault("show_default", settings.get("default") is not None)
    return click.option(*names, cls=Option, group=group, **settings)


def options_of(
    struct: type[msgspec.Struct],
    *names: str,
    group: str = OTHER,
    without: Iterable[str] = (),
    defaults: Mapping[str, str] | None = None,
) -> Callable[[Function], Function]:
    """Declare an option for each field of ``struct``, or for its fields ``names``.

    With ``defaults``, a text for each field, an option that is not given is None: its value is
    chosen later, and the text is what help shows.
    """
    fields = [field for field in msgspec.structs.fields(struct) if field.name not in without]

    def decorate(function: Function) -> Function:
        for field in reversed(fields):
            if not names or field.name in names:
                function = _declare(field, group, defaults)(function)
        return function

    return decorate


def _declare(
    field: msgspec.structs.FieldInfo, group: str, defaults: Mapping[str, str] | None
) -> Callable[[Function], Function]:
    meta = metadata(field.type)
    extra = meta.extra or {}
    settings: dict[str, Any] = {
        "help": (meta.extra_json_schema or {}).get("description", ""),
        "metavar": extra.get("metavar"),
        "type": click_type(field.type),
    }
    flag = f"--{field.name.replace('_', '-')}"
    if isinstance(base_type(field.type), inspect.BoolType):
        del settings["type"], settings["metavar"]
        settings["is_flag"] = True
        if field.default is True:
            settings["flag_value"] = False
    elif isinstance(field.default, tuple):
        settings["multiple"] = True
    if defaults is None:
        settings["default"] = field.default
        settings["show_default"] = field.default not in (None, (), True, False)
    else:
        settings["default"] = None
        if text := defaults.get(field.name):
            settings["help"] += f"  [default: {text}]"
    name = extra.get("option", flag)
    return click.option(
        *name.split("/"), field.name, cls=Option, group=group, field=field, **settings
    )


def metadata(annotation: Any) -> inspect.Metadata:
    """Return the description and the extras of a field's type, or empty ones."""
    found = inspect.type_info(annotation)
    if isinstance(found, inspect.UnionType):
        found = next((kind for kind in found.types if isinstance(kind, inspect.Metadata)), found)
    return found if isinstance(found, inspect.Metadata) else inspect.Metadata(found)


def click_type(annotation: Any) -> Any:
    """Return click's type for the values of a field."""
    if names := choices(annotation):
        return click.Choice(names)
    kinds = {inspect.IntType: int, inspect.FloatType: float, inspect.StrType: str}
    return kinds.get(type(base_type(annotation)))
