"""The README says what is true: its figures are the results', its links and commands exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from trainkit.bench.readme import BLOCKS, filled
from trainkit.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_figures_are_those_of_the_results():
    for document, names in BLOCKS.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        assert filled(text, names, ROOT / "bench" / "results") == text


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_its_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("line", re.findall(r"^trainkit .*$", README, re.MULTILINE))
def test_its_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command, context = cli, click.Context(cli)
    while isinstance(command, click.Group):
        command = command.get_command(context, words.pop(0))
    command.make_context("trainkit", words)


def test_the_first_forty_lines_show_the_way():
    top = "\n".join(README.splitlines()[:40])
    for needed in (
        "make demo",
        "make test",
        "trainkit train",
        "trainkit export",
        "Classifier.load",
    ):
        assert needed in top
