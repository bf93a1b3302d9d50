"""The search for int8 settings: its order, its records, and that it can fail."""

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from trainkit.export.accuracy_gate import AccuracyGate, AccuracyLimits
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.search import CANDIDATES, SearchResult, search
from trainkit.export.precision.sensitivity import rank
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.trainer.metrics import evaluate

LIMITS = AccuracyLimits(max_drop_points=0.5)


def gate_of(logits, labels):
    names = tuple(f"label {number}" for number in range(logits.shape[1]))
    true = [names[label] for label in labels]
    return AccuracyGate(
        [f"text {number}" for number in range(len(logits))],
        true,
        names,
        "single_label_classification",
        logits,
        evaluate(logits, true, names),
    )


@pytest.fixture
def answers(rng):
    """Return the logits of 200 texts with 4 labels, and which are right: all."""
    logits = rng.normal(0, 1, (200, 4)).astype(np.float32)
    return gate_of(logits, logits.argmax(axis=1))


def wrong(gate, texts):
    """Return the gate's logits with the first ``texts`` of them labelled otherwise."""
    logits = gate.logits.copy()
    logits[:texts] = np.roll(logits[:texts], 1, axis=1)
    return logits


class Fake:
    """Evaluates candidates in turn: each answer is (N, C) logits or an error to raise."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, path):
        assert path.is_file()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def calibration(rows=2):
    ids = np.arange(rows * 9).reshape(rows, 9) % 50
    return [Batch(ids, np.ones_like(ids))]


def test_what_the_gate_lets_through_may_have_another_fault(tiny_encoder, answers, tmp_path):
    seen = []

    def fault(path):
        assert path.is_file()
        seen.append(path)
        return "noisy" if len(seen) == 1 else ""

    fake = Fake(wrong(answers, 10), answers.logits)
    given = {"calibration": calibration(), "fault": fault}
    tries = search(tiny_encoder, answers, LIMITS, fake, tmp_path, **given).result.tries
    assert [one.reason for one in tries[1:]] == ["noisy", ""]
    assert (len(seen), tries[1].drop_points, tries[1].passed) == (2, 0, False)


def test_the_first_that_passes_is_chosen_and_the_order_is_that_of_the_candidates(
    tiny_encoder, answers, tmp_path
):
    fake = Fake(wrong(answers, 10), wrong(answers, 2), answers.logits)
    found = search(tiny_encoder, answers, LIMITS, fake, tmp_path, calibration=calibration())
    assert [one.settings for one in found.result.tries] == list(CANDIDATES[:3])
    assert [one.passed for one in found.result.tries] == [False, False, True]
    assert [one.drop_points for one in found.result.tries] == pytest.approx([5.0, 1.0, 0.0])
    assert found.result.chosen == found.result.tries[2] == found.result.check()
    assert found.result.tries[0].reason == "accuracy drops by 5.00 points, over 0.5"
    assert all(one.size_ratio < 1 for one in found.result.tries)
    assert found.model is not None
    assert (found.outcome.name, found.outcome.rewritten) == ("int8", 5)


def test_the_record_survives_json(tiny_encoder, answers, tmp_path):
    fake = Fake(RuntimeError("no such operator\nat line 3"), answers.logits)
    result = search(tiny_encoder, answers, LIMITS, fake, tmp_path).result
    assert msgspec.json.decode(msgspec.json.encode(result), type=SearchResult) == result
    assert result.tries[0].reason == "RuntimeError: no such operator"
    assert result.tries[0].accuracy is None


def test_without_texts_to_calibrate_on_static_settings_are_left_out(
    tiny_encoder, answers, tmp_path
):
    found = search(tiny_encoder, answers, LIMITS, Fake(answers.logits), tmp_path)
    assert found.result.chosen.settings.activations == "per token"


def test_the_most_sensitive_stay_in_float32_one_two_four(tiny_encoder, answers, tmp_path):
    bad = wrong(answers, 50)
    # Two candidates fail; then each of five sites is quantised alone, the third hurts most.
    alone = [answers.logits + np.float32(shift) for shift in (0.2, 0.1, 0.5, 0.3, 0.4)]
    fake = Fake(bad, bad, *alone, bad, bad, answers.logits)
    found = search(tiny_encoder, answers, LIMITS, fake, tmp_path)
    kept = [one.settings.keep for one in found.result.tries]
    assert kept == [(), (), ("k",), ("k", "logits"), ("k", "logits", "v", "x")]
    assert [one.names[0] for one in found.result.sensitivity] == ["k", "logits", "v", "x", "q"]
    assert found.result.chosen.settings.keep == kept[-1]
    assert found.result.tries[-1].size_bytes > found.result.tries[0].size_bytes


def test_where_nothing_passes_the_sentence_names_the_nearest(tiny_encoder, answers, tmp_path):
    result = search(tiny_encoder, answers, LIMITS, Fake(wrong(answers, 50)), tmp_path)
    assert (result.model, result.outcome, result.result.chosen) == (None, None, None)
    assert len(result.result.tries) == 2 + 3  # 1, 2 and 4 of five sites in float32
    with pytest.raises(CheckFailedError, match=r"none of 5 .* 200 texts; the nearest: accuracy"):
        result.result.check()


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (np.full((200, 4), np.nan, np.float32), "NaN"),
        (np.zeros((200, 3), np.float32), "shape"),
    ],
)
def test_what_is_no_answer_does_not_pass(answers, logits, reason):
    verdict = answers.check(logits, LIMITS)
    assert not verdict.passed
    assert reason in verdict.reason


def test_a_drop_of_just_the_limit_passes(answers):
    assert answers.check(wrong(answers, 1), LIMITS).passed  # 0.5 points
    assert not answers.check(wrong(answers, 2), LIMITS).passed


def test_labels_must_agree_even_where_accuracy_does_not_fall(answers):
    limits = AccuracyLimits(max_drop_points=5, min_label_agreement=0.99)
    verdict = answers.check(wrong(answers, 3), limits)
    assert verdict.reason == "98.50% of labels agree, under 99%"


def test_accuracy_that_rises_is_a_negative_drop(answers):
    worse = answers._replace(logits=wrong(answers, 10))
    worse = gate_of(worse.logits, answers.logits.argmax(axis=1))
    assert worse.check(answers.logits, LIMITS).report.drop_points == pytest.approx(-5)


def test_limits_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="0 points or more"):
        AccuracyLimits(max_drop_points=float("nan"))
    with pytest.raises(InputError, match="from 0 to 1"):
        AccuracyLimits(max_drop_points=1, min_label_agreement=99)


def test_the_product_with_an_outlier_is_the_most_sensitive(
    tiny_encoder, encoder_parts, tokens, tmp_path
):
    # One weight a hundred times the others: a scale for the whole of it leaves the others nothing.
    encoder_parts["w_v"][0, 0] = 100

    def evaluate_file(path):
        return ort.InferenceSession(str(path)).run(["logits"], tokens)[0]

    def quantised(settings):
        from trainkit.export.precision.int8 import to_int8

        model = tiny_encoder()
        to_int8(model, settings)
        ir.save(model, tmp_path / "one.onnx")
        return tmp_path / "one.onnx"

    ir.save(tiny_encoder(), tmp_path / "fp32.onnx")
    reference = evaluate_file(tmp_path / "fp32.onnx")
    settings = Int8Settings(weight_bits=7)
    order = rank(tiny_encoder, settings, quantised, evaluate_file, reference)
    assert order[0].names == ("v",)
    assert order[0].rms > 2 * order[1].rms > 0


def test_a_product_that_the_runtime_cannot_run_is_the_most_sensitive(tiny_encoder, tmp_path):
    def fails_on_v(settings):
        return tmp_path / ("fails" if "v" not in settings.keep else "runs")

    def evaluate_file(path):
        if path.name == "fails":
            raise RuntimeError("no kernel for it")
        return np.ones((2, 3), np.float32)

    order = rank(tiny_encoder, Int8Settings(), fails_on_v, evaluate_file, np.zeros((2, 3)))
    assert (order[0].names, order[0].rms) == (("v",), None)
    assert all(one.rms == 1 for one in order[1:])
