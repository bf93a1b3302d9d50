"""House style: no banned phrase in documents, docstrings, comments, messages and help."""

import ast
import io
import re
import tokenize
from pathlib import Path

import click
import pytest

from trainkit.cli import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("trainkit", "export", "serve", "bench")

THINGS = "texts?|tokens?|requests?|rows?|batches|samples?|operations|questions|posts|positions"
BANNED = {
    r"\bin goe?s?\b(?= \w+[;,])|\bout comes?\b": "Takes X and returns Y.",
    r"\banew\b|\bafresh\b": "again, or a new one",
    r"\bwh(?:o|at|ich)ever\b|\bnobody\b|\bstranger": "name the thing",
    r"\bso many\b|\bas many(?=[.,;:)]|$)": "name the parameter",
    r"(?<!there )\b(?:is|are) no (?:\w+ )?(?:file|folder|directory|bundle|number)s?\b": "is not a",
    rf"\b(?:{THINGS}) an? (?:second|minute|row|text|batch|layer|request|core)\b": "per or /s",
    r"[\d}] %(?![\w(])|[dfg] %%": "no space before the per cent sign",
    r"\btold\b|\bsaid\b|\bsa(?:ys?|id) so\b": "reports, logs, the message",
    r"(?:Error|Exception)`* where\b": "Raises X if ...",
}


def offences(text):
    """Return each banned phrase in a text, with what to write instead."""
    for pattern, instead in BANNED.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            line = text[: match.start()].count("\n")
            yield line, f"{match.group()!r}: {instead}"


def words_of_code(source):
    """Yield line and text of every string, docstring and comment of a Python module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)
        ):
            yield node.lineno, ast.get_source_segment(source, node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def in_folder(name):
    for path in sorted((ROOT / name).rglob("*.py")):
        found = set()
        for line, text in words_of_code(path.read_text(encoding="utf-8")):
            found |= {(line + offset, offence) for offset, offence in offences(text)}
        yield from (
            f"{path.relative_to(ROOT)}:{line}: {offence}" for line, offence in sorted(found)
        )


def in_documents():
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench").rglob("*.md"),
    ]:
        for line, offence in offences(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(ROOT)}:{line + 1}: {offence}"


def in_help(command=cli, name="trainkit"):
    texts = [("", command.help or "")]
    for option in command.params:
        if isinstance(option, click.Option):
            texts.append((option.opts[0], option.help or ""))
    for option, text in texts:
        if not text:
            yield f"{name} {option}: no help"
        elif text.startswith("Of "):
            yield f"{name} {option}: {text!r} has no noun"
        yield from (f"{name} {option}: {offence}" for _, offence in offences(text))
    for each, sub in getattr(command, "commands", {}).items():
        yield from in_help(sub, f"{name} {each}")


PLACES = {name: lambda name=name: in_folder(name) for name in FOLDERS}
PLACES |= {"documents": in_documents, "help": in_help}


@pytest.mark.parametrize("place", PLACES)
def test_words(place):
    assert not list(PLACES[place]())


def test_banned_phrases_are_found():
    text = "In go texts; out comes a label, made anew at 95 %, 30 texts a second. `KeyError` where"
    assert len(list(offences(text))) == 6


if __name__ == "__main__":
    for offence in (offence for find in PLACES.values() for offence in find()):
        print(offence)
