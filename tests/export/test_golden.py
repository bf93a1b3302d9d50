"""The committed bundle stands for those that users have stored: it must go on working."""

from pathlib import Path

from trainkit.export.verify import verify
from trainkit.serve import Classifier

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"


def test_the_golden_bundle_still_computes_what_it_computed():
    report = verify(GOLDEN)
    assert report.passed
    assert report.cases == 68


def test_the_golden_bundle_still_answers():
    classify = Classifier.load(GOLDEN)
    asked = {"How many people live in Peru?": "NUM", "Who wrote the Odyssey?": "HUM"}
    assert {text: classify(text).label for text in asked} == asked
