"""The commands give today what they gave when ``tests/golden/behaviour.json`` was recorded."""

import json
import sys
from pathlib import Path

import pytest

from tests.golden import behaviour

RECORDED = json.loads(behaviour.RECORDED.read_text(encoding="utf-8"))
TRAINKIT = str(Path(sys.executable).parent / "trainkit")


def near(value, tolerance):
    """Return ``value`` with every number in it compared to ``tolerance``."""
    if isinstance(value, dict):
        return {key: near(entry, tolerance) for key, entry in value.items()}
    if isinstance(value, list):
        return [near(entry, tolerance) for entry in value]
    if isinstance(value, float):
        return pytest.approx(value, rel=tolerance, abs=tolerance)
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.slow
def test_training_and_export_give_the_same_model(folder):
    # Rounding differs between processors, and grows from step to step; an epoch more or another
    # seed moves the loss by several percent.
    trained = {kind: behaviour.trained(TRAINKIT, kind, folder) for kind in ("prefix", "simple")}
    assert trained["prefix"] == near(RECORDED["train"]["prefix"], 2e-3)
    for name, scores in RECORDED["train"]["simple"].items():
        assert trained["simple"][name]["loss"] == pytest.approx(scores["loss"], rel=0.02)
        # Two of 72 texts.
        assert trained["simple"][name]["accuracy"] == pytest.approx(
            scores["accuracy"], abs=2.1 / 72
        )
    exported = behaviour.exported(TRAINKIT, folder)
    assert exported["answers"] == near(RECORDED["export"]["answers"], 2e-3)
    assert exported["operators"] == RECORDED["export"]["operators"]


def test_http_answers_are_the_same():
    for answer, recorded in zip(behaviour.answers(TRAINKIT), RECORDED["http"], strict=True):
        request = recorded["request"]
        assert (request, answer["status"]) == (request, recorded["status"])
        if recorded["status"] == 200:
            for timed in (answer, recorded):
                assert timed["body"].pop("timings_ms", {"total": 1})["total"] > 0
            assert answer["body"] == near(recorded["body"], 1e-5), request
        else:
            assert set(answer["body"]) == {"error"}, request  # its words may be improved


def test_comparison_and_advice_on_kept_results_are_the_same():
    found = json.loads(json.dumps(behaviour.benchmarked(TRAINKIT)))
    # Kept results have seven digits.
    assert found["compare"] == near(RECORDED["bench"]["compare"], 1e-5)
    assert found["recommend"] == near(RECORDED["bench"]["recommend"], 1e-5)
    for row, recorded in zip(found["report"], RECORDED["bench"]["report"], strict=True):
        assert row[:2] == recorded[:2]
        for figure, expected in zip(row[2:], recorded[2:], strict=True):
            number = expected.replace(".", "", 1).isdigit()
            assert figure == expected or (
                number and float(figure) == pytest.approx(float(expected), rel=1e-5)
            )
