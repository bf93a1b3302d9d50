"""What ``python -m trainkit.bench.NAME`` says of bad input."""

import pytest
from click.testing import CliRunner

from trainkit.bench.studies import ablation, suite, trec
from trainkit.bench.studies.serving import study

FOLDERS = ["--classifier", "nowhere", "--fp32", "nowhere", "--int8", "nowhere"]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (ablation.STUDY.command, ["nowhere", "--data", "nowhere"]),
        (suite.STUDY.command, ["--data", "nowhere"]),
        (trec.STUDY.command, ["--data", "nowhere"]),
        (study.STUDY.command, [*FOLDERS, "--peers-python", "nowhere/python"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(program, arguments):
    done = CliRunner().invoke(program, arguments)
    assert done.exit_code == 2
    assert done.output.startswith("Error: nowhere")
    assert "Traceback" not in done.output
