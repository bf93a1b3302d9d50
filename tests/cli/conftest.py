"""The command line in this process, and what every refusal of it must be."""

import csv

import pytest
from click.testing import CliRunner

from trainkit.cli import cli
from trainkit.data.splits import load_sample


@pytest.fixture(scope="session")
def trainkit():
    """Return a function that runs ``trainkit`` with these arguments and gives click's result."""

    def run(*arguments, stdin=None):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture
def refused(trainkit, tree, tmp_path):
    """Return a function that runs ``trainkit`` and demands a refusal: it gives the sentence.

    Exit code 2, one line on standard error, nothing on standard output, and every file under
    ``tmp_path`` as it was. ``told`` are the parts that the sentence must have.
    """

    def run(*arguments, told=(), stdin=None):
        before = tree(tmp_path)
        result = trainkit(*arguments, stdin=stdin)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 2
        # A progress bar that ends off a terminal leaves an empty line.
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        if not lines[0].startswith("Usage: "):
            assert len(lines) == 1, result.stderr
        assert lines[-1].startswith("Error: ")
        for part in told:
            assert part in lines[-1]
        assert result.stdout == ""
        assert tree(tmp_path) == before
        return lines[-1]

    return run


@pytest.fixture
def questions(tmp_path):
    """Return a CSV file with 150 of the project's own questions."""
    path = tmp_path / "questions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([example.text, example.label] for example in load_sample()[:150])
    return path


@pytest.fixture
def runs(tmp_path):
    """Return a folder for runs that exists already."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder
