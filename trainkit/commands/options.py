"""Options made from settings structs, in groups: type, range, default and help stand in the struct.

A field is ``Annotated[int, Meta(ge=1, description="...", extra={...})]``; ``extra`` may hold
``option`` and ``parameter`` if their names are not the field's, ``group``, ``metavar``, and the
``words`` that the option takes beside numbers; a ``hidden`` field has no option.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click
import msgspec
from msgspec import inspect

from trainkit.cli_errors import ErrorReportingCommand
from trainkit.serve.errors import InputError
from trainkit.serve.fields import base_type, choices, description, metadata, value_faults

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
        if self.field is None or value is None or value in words(self.field.type):
            return []
        return list(value_faults(self.opts[0], self.field.type, value))


class Command(ErrorReportingCommand):
    """A command that lists its options in groups and checks them all before it runs."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups, that of ``--help`` last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and isinstance(parameter, click.Option):
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
    fields = [
        field
        for field in msgspec.structs.fields(struct)
        if field.name not in without and not (metadata(field.type).extra or {}).get("hidden")
    ]

    def decorate(function: Function) -> Function:
        for field in reversed(fields):
            if not names or field.name in names:
                function = _declare(field, group, defaults)(function)
        return function

    return decorate


def _declare(
    field: msgspec.structs.FieldInfo, group: str, defaults: Mapping[str, str] | None
) -> Callable[[Function], Function]:
    extra = metadata(field.type).extra or {}
    settings: dict[str, Any] = {
        "help": description(field.type),
        "metavar": extra.get("metavar"),
        "type": click_type(field.type),
    }
    flag = f"--{field.name.replace('_', '-')}"
    if isinstance(base_type(field.type), inspect.BoolType):
        del settings["type"], settings["metavar"]
        settings["is_flag"] = True
        if field.default is True:  # such as --no-optimize
            settings["flag_value"] = False
    elif isinstance(field.default, tuple):
        settings["multiple"] = True
    if defaults is None:
        settings["default"] = field.default
        settings["show_default"] = field.default not in (None, ()) and not settings.get("is_flag")
    else:
        settings["default"] = None
        if text := defaults.get(field.name):
            settings["help"] += f"  [default: {text}]"
    names = (*(extra.get("option") or flag).split("/"), extra.get("parameter") or field.name)
    group = extra.get("group") or group
    return click.option(*names, cls=Option, group=group, field=field, **settings)


def words(annotation: Any) -> tuple[str, ...]:
    """Return the words that an option takes beside its field's values, such as "auto"."""
    return tuple((metadata(annotation).extra or {}).get("words", ()))


def click_type(annotation: Any) -> Any:
    """Return click's type for the values of a field."""
    if names := choices(annotation):
        return click.Choice(names)
    if beside := words(annotation):
        return _number_or_word(beside)
    kinds = {inspect.IntType: int, inspect.FloatType: float, inspect.StrType: str}
    return kinds.get(type(base_type(annotation)))


def _number_or_word(beside: tuple[str, ...]) -> Callable[[str], float | str]:
    def read(value: str) -> float | str:
        try:
            return value if value in beside else float(value)
        except ValueError:
            names = " nor ".join(map(repr, beside))
            raise click.BadParameter(f"'{value}' is neither a number nor {names}.") from None

    return read
