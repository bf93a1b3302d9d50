"""The parity checker: what it covers, and that it refuses what it must refuse."""

import numpy as np
import pytest

from trainkit.export import parity, parity_cases
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, InputError


def reference(batch):
    """Mean of the visible ids' sines and cosines: depends on every token and on the mask."""
    mask = batch.attention_mask[..., None]
    features = np.stack([np.sin(batch.input_ids), np.cos(batch.input_ids), batch.input_ids % 7], -1)
    return ((features * mask).sum(1) / np.maximum(mask.sum(1), 1)).astype(np.float32)


@pytest.fixture
def cases(word_encoder, splits):
    texts = [example.text for example in splits.test[:20]]
    return parity_cases.run_reference(reference, parity_cases.make_cases(word_encoder, texts))


def test_the_matrix_covers_every_size_and_mask(cases, word_encoder):
    shapes = {case.batch.input_ids.shape for case in cases}
    assert {(b, s) for b in (1, 2, 7) for s in (1, 2, 17, word_encoder.max_length)} <= shapes
    names = [case.name for case in cases]
    for kind in ("full", "right", "left", "gapped", "one row blank"):
        assert sum(kind in name for name in names) == 12
    assert sum(name.startswith("texts") for name in names) == 3
    blank = next(case for case in cases if case.name == "7 x 17, one row blank")
    assert blank.batch.attention_mask[-1].sum() == 0
    left = next(case for case in cases if case.name == "7 x 17, left")
    assert (left.batch.attention_mask[1:, 0] == 0).any()
    assert (left.batch.attention_mask[:, -1] == 1).all()
    assert all((case.batch.attention_mask == 0).any() for case in cases if "1 x 17, r" in case.name)


def test_the_same_computation_passes(cases):
    report = parity.compare(cases, lambda batch: reference(batch) + np.float32(1e-6))
    assert report.passed
    assert report.label_agreement == 1
    assert report.cases == len(cases)
    assert report.max_abs == pytest.approx(1e-6, rel=0.1)


def failing(run, cases):
    report = parity.compare(cases, run)
    assert not report.passed
    assert not report.worst[0].passed
    assert str(parity.ParityError(report)).startswith("parity failed")
    return report


def test_a_difference_over_the_tolerance_is_refused(cases):
    assert "tolerance" in failing(lambda batch: reference(batch) * 1.001, cases).worst[0].reason


def test_a_lost_mask_is_refused(cases):
    report = failing(
        lambda batch: reference(batch._replace(attention_mask=np.ones_like(batch.input_ids))), cases
    )
    assert report.failed >= 40  # everything but the cases without padding


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_no_number_is_refused(cases, value):
    def run(batch):
        logits = reference(batch)
        if batch.input_ids.shape[0] == 7:
            logits[3, 1] = value
        return logits

    assert "NaN" in failing(run, cases).worst[0].reason


def test_swapped_labels_are_refused(cases):
    report = failing(lambda batch: reference(batch)[:, ::-1], cases)
    assert report.label_agreement < 1


def test_a_changed_label_is_refused_even_within_the_tolerance():
    batch = Batch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))
    tie = parity_cases.Case("a tie", batch, np.array([[1.0, 1.000001]], np.float32))
    report = failing(lambda batch: np.array([[1.000001, 1.0]], np.float32), [tie])
    assert report.worst[0].reason == "1 of 1 labels changed"


def test_a_changed_yes_or_no_is_refused_where_there_may_be_several():
    batch = Batch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))
    case = parity_cases.Case("one row", batch, np.array([[1e-6, 1.0]], np.float32))
    found = np.array([[-1e-6, 1.0]], np.float32)
    several = parity.compare([case], lambda batch: found, problem_type="multi_label_classification")
    assert several.worst[0].reason == "1 of 1 labels changed"
    assert parity.compare([case], lambda batch: found).passed


def test_int8_says_which_labels_changed_only_for_a_near_tie():
    batch = Batch(np.zeros((3, 1), np.int64), np.ones((3, 1), np.int64))
    expected = np.array([[4.0, 0.0], [1.1, 1.0], [0.0, 5.0]], np.float32)
    cases = [parity_cases.Case("three rows", batch, expected)]
    noisy = np.array([[4.0, 2.0], [1.0, 1.1], [3.0, 2.0]], np.float32)  # its error is 1.9
    report = parity.compare(cases, lambda batch: noisy, "int8")
    assert report.why == (
        "the differences are 98.8% of the logits' spread, not 25% at most; of 2 changed labels 1 "
        "changed only because the two largest logits lie nearer together than the error"
    )
    assert str(parity.ParityError(report)).endswith(f"{report.why}.")
    assert parity.compare(cases, lambda batch: expected, "int8").why == ""
    assert parity.compare(cases, lambda batch: noisy).why.startswith("three rows: difference over")
    assert parity.compare([], reference).why == "no case"


def test_rows_in_another_order_are_refused(cases):
    failing(lambda batch: reference(batch)[::-1], cases)


def test_a_runtime_that_fails_on_one_shape_is_a_finding_and_the_rest_is_run(cases):
    def run(batch):
        if batch.input_ids.shape == (2, 17):
            raise RuntimeError("cannot broadcast (2,17)\nat node 5")
        return reference(batch)

    report = failing(run, cases)
    assert report.failed == 5
    assert report.worst[0].reason == "RuntimeError: cannot broadcast (2,17)"


def test_a_wrong_shape_is_refused(cases):
    assert "shape" in failing(lambda batch: reference(batch)[:, :2], cases).worst[0].reason


def test_no_cases_are_no_proof():
    assert not parity.compare([], reference).passed


def test_a_reference_that_gives_nan_is_refused(word_encoder):
    inputs = parity_cases.make_cases(word_encoder, [])
    with pytest.raises(CheckFailedError, match="the model itself gives NaN"):
        parity_cases.run_reference(lambda batch: reference(batch) * np.nan, inputs)


def test_a_mask_that_makes_nan_of_rows_without_tokens_is_named(word_encoder):
    def minus_infinity(batch):
        return np.where(batch.attention_mask.any(axis=1)[:, None], reference(batch), np.nan)

    inputs = parity_cases.make_cases(word_encoder, [])
    with pytest.raises(CheckFailedError, match="its mask makes them of a row without tokens"):
        parity_cases.run_reference(minus_infinity, inputs)


def test_cases_come_back_from_their_file(cases, tmp_path):
    path = tmp_path / "parity.npz"
    parity_cases.save_cases(path, cases)
    for case, again in zip(cases, parity_cases.load_cases(path), strict=True):
        assert case.name == again.name
        assert all(
            np.array_equal(a, b) for a, b in zip(case.batch[:2], again.batch[:2], strict=True)
        )
        assert np.array_equal(case.expected, again.expected)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"parity\.npz cannot be read"):
        parity_cases.load_cases(path)


def test_an_error_without_a_message_is_a_finding_too(cases):
    def run(batch):
        raise RuntimeError

    assert failing(run, cases).worst[0].reason == "RuntimeError: RuntimeError"
