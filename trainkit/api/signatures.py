"""Keyword arguments from settings structs: the signature and the documentation of a function.

A function that passes ``**options`` on to a struct gets the struct's fields as its parameters, with
their defaults and descriptions, so that ``help()`` and notebooks show them and they cannot drift
from the options of the command line, which are made from the same structs.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import msgspec

from trainkit.serve.fields import description, metadata

P = ParamSpec("P")
R = TypeVar("R")


def takes_fields(
    *structs: type[msgspec.Struct], without: Iterable[str] = (), later: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function with ``**options`` show and accept the fields of ``structs``.

    ``later``: an option that is not given is None, and its default is chosen in the function. The
    function raises TypeError for an unknown option, as any Python function does.
    """
    fields = [
        field
        for struct in structs
        for field in msgspec.structs.fields(struct)
        if field.name not in without and not (metadata(field.type).extra or {}).get("hidden")
    ]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if later else field.default,
                annotation=field.type,
            )
            for field in fields
        ]
        known = {parameter.name for parameter in (*own, *options)}

        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            for name in given:
                if name not in known:
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument {name!r}"
                    )
            return function(*args, **given)

        call.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n" + "\n".join(map(_line, fields))
        return call

    return decorate


def _line(field: msgspec.structs.FieldInfo) -> str:
    shown = "" if field.default in (None, msgspec.NODEFAULT) else f" (default {field.default!r})"
    return textwrap.fill(
        f"{field.name}{shown}: {description(field.type)}",
        width=96,
        initial_indent="    ",
        subsequent_indent="        ",
    )
