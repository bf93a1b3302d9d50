"""Fields of settings structs: checks of their constraints, and sentences about them.

A field declares its constraints and its meaning in one place, ``Annotated[int, Meta(ge=1,
description="...")]``; the command line and the Python API are made from that. msgspec checks them
when it decodes; :func:`check_fields` does so for a struct that Python code constructed.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import inspect

from trainkit.serve.errors import InputError

KINDS: dict[type[inspect.Type], str] = {
    inspect.BoolType: "true or false",
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "a text",
}


def check_fields(struct: msgspec.Struct, title: str) -> None:
    """Raise InputError that names every field whose value breaks its own constraints."""
    if found := list(faults(struct)):
        raise InputError(f"{title}: {'; '.join(found)}.")


def faults(struct: msgspec.Struct) -> Iterator[str]:
    """Yield a sentence for every field whose value breaks its own constraints."""
    for field in msgspec.structs.fields(type(struct)):
        yield from value_faults(field.name, field.type, getattr(struct, field.name))


def value_faults(name: str, annotation: Any, value: Any) -> Iterator[str]:
    """Yield a sentence about ``name`` if ``value`` breaks the constraints of ``annotation``.

    Of a tuple each wrong item is named.
    """
    for given in [value] if not isinstance(value, tuple) else [(item,) for item in value]:
        item = given[0] if isinstance(given, tuple) else given
        try:
            msgspec.convert(given, annotation)
            valid = not isinstance(item, float) or math.isfinite(item)
        except msgspec.ValidationError:
            valid = False
        if not valid:
            yield f"{name} must be {expectation(annotation, item)}, not {item!r}"


def base_type(annotation: Any) -> inspect.Type:
    """Return what a field takes: without its description, without None, of a tuple its items."""
    found = inspect.type_info(annotation)
    while True:
        if isinstance(found, inspect.Metadata):
            found = found.type
        elif isinstance(found, inspect.UnionType):
            found = next(kind for kind in found.types if not isinstance(kind, inspect.NoneType))
        elif isinstance(found, inspect.VarTupleType):
            found = found.item_type
        else:
            return found


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of the Literal in an annotation, in their order; none without one."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(choices, get_args(annotation))), ())


def expectation(annotation: Any, value: Any = None) -> str:
    """Describe what a field takes, such as "at least 1" or "a whole number".

    For a numeric ``value`` these are its bounds, for anything else the kind of value.
    """
    found = base_type(annotation)
    if isinstance(found, inspect.LiteralType):
        return "one of " + ", ".join(map(repr, choices(annotation)))
    if isinstance(found, inspect.IntType | inspect.FloatType) and _has_kind(found, value):
        return _bounds(found) or KINDS[type(found)]
    return KINDS.get(type(found), "another value")


def _has_kind(found: inspect.IntType | inspect.FloatType, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and isinstance(found, inspect.FloatType))


def _bounds(found: inspect.IntType | inspect.FloatType) -> str:
    low = found.ge if found.ge is not None else found.gt
    high = found.le if found.le is not None else found.lt
    if low is not None and high is not None:
        brackets = "[" if found.ge is not None else "(", "]" if found.le is not None else ")"
        return f"in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
    if low is not None:
        return f"at least {low:g}" if found.ge is not None else f"above {low:g}"
    if high is not None:
        return f"at most {high:g}" if found.le is not None else f"below {high:g}"
    return ""


def metadata(annotation: Any) -> inspect.Metadata:
    """Return the metadata of a field's type: its description and extras, empty without any."""
    found = inspect.type_info(annotation)
    if isinstance(found, inspect.UnionType):
        found = next((kind for kind in found.types if isinstance(kind, inspect.Metadata)), found)
    return found if isinstance(found, inspect.Metadata) else inspect.Metadata(found)


def description(annotation: Any) -> str:
    """Return the description of a field's type."""
    return str((metadata(annotation).extra_json_schema or {}).get("description", ""))
