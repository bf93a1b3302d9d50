"""Options made from settings structs, and the help of all commands."""

import re
import subprocess
import sys
from typing import Annotated, Literal

import click
import msgspec
import pytest
from click.testing import CliRunner
from msgspec import Meta

from trainkit.cli import cli
from trainkit.commands.options import command, options_of


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """A struct with a field of every kind."""

    rows: Annotated[int, Meta(ge=1, le=9, description="Rows of it.")] = 3
    share: Annotated[float, Meta(ge=0, lt=1, description="Fraction of it.")] = 0.0
    limit: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Upper limit.", extra={"option": "--below", "group": "Limits"}),
    ] = None
    kind: Annotated[Literal["b", "a"], Meta(description="Kind of it.")] = "b"
    fast: Annotated[bool, Meta(description="Be fast.")] = False
    checked: Annotated[
        bool, Meta(description="Skip the check.", extra={"option": "--no-check"})
    ] = True
    sizes: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(description="Sizes.", extra={"option": "--size"}),
    ] = (32,)
    rate: Annotated[float, Meta(gt=0, description="Rate.", extra={"words": ("auto",)})] = 0.5
    secret: Annotated[int, Meta(extra={"hidden": "yes"})] = 1


@command()
@options_of(Sizes, group="Sizes")
def sized(**given):
    """Print what was given."""
    click.echo(repr(given))


def invoke(*arguments):
    return CliRunner().invoke(sized, arguments)


def test_defaults_are_the_structs():
    given = eval(invoke().stdout)
    assert Sizes(**given) == Sizes()
    assert "secret" not in given


def test_every_kind_of_field_is_read():
    arguments = "--rows 9 --share 0.5 --below 2 --kind a --fast --no-check --size 1 --size 8"
    given = eval(invoke(*arguments.split(), "--rate", "auto").stdout)
    assert given.pop("rate") == "auto"
    expected = Sizes(rows=9, share=0.5, limit=2, kind="a", fast=True, checked=False, sizes=(1, 8))
    assert Sizes(**given) == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--rows 0", "--rows must be in [1, 9], not 0"),
        ("--share 1 --rows 10", "--rows must be in [1, 9], not 10; --share must be in [0, 1)"),
        ("--share nan", "--share must be in [0, 1), not nan"),
        ("--below 0", "--below must be above 0, not 0.0"),
        ("--size 8 --size 0", "--size must be at least 1, not 0"),
        ("--rate -1", "--rate must be above 0, not -1.0"),
        ("--rate fast", "'fast' is neither a number nor 'auto'"),
        ("--kind c", "'c' is not one of 'b', 'a'"),
        ("--rows many", "'many' is not a valid int"),
    ],
)
def test_a_wrong_value_is_named_with_its_option(arguments, sentence):
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_help_has_groups_and_defaults():
    shown = " ".join(invoke("--help").stdout.split())
    assert "Sizes: --rows INTEGER Rows of it. [default: 3]" in shown
    assert "Limits: --below FLOAT Upper limit." in shown
    assert "--size INTEGER Sizes. [default: 32]" in shown


def leaves(group=cli, path=()):
    for name, found in group.commands.items():
        if isinstance(found, click.Group):
            yield from leaves(found, (*path, name))
        else:
            yield pytest.param(found, id=" ".join((*path, name)))


@pytest.mark.parametrize("found", list(leaves()))
def test_every_option_of_a_command_has_a_whole_phrase_as_help(found):
    for option in found.params:
        if isinstance(option, click.Option) and option.name != "help":
            text = option.help or ""
            assert re.match(r"[A-Z0-9.]|pt2|int8", text), (option.opts, text)
            assert not text.startswith(("Of ", "That ", "At most")), (option.opts, text)
            phrase = text.partition("  [default")[0].strip()
            assert phrase.endswith((".", ")")), (option.opts, text)
            assert len(phrase.split()) >= 2, (option.opts, text)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["serve", "--help"]])
def test_help_is_fast_and_imports_nothing_that_computes(arguments):
    program = (
        "import sys, time; began = time.process_time()\n"
        "from trainkit.cli import cli\n"
        f"try: cli({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(time.process_time() - began, file=sys.stderr)\n"
        "print(*sorted(set(sys.modules) & {'numpy', 'torch', 'onnxruntime'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    took, heavy = done.stderr.split("\n")[-3:-1]
    assert heavy == "", done.stderr
    assert float(took) < 0.3  # seconds of CPU time, which other processes do not change
