"""A run's temperature goes into its bundle and its answers, and its calibration error is Guo's."""

import json
import math

import msgspec
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.export.runtimes import open_classifier
from trainkit.serve import Classifier, bundle
from trainkit.serve.calibration import fit_temperature
from trainkit.trainer import checkpoint
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import evaluate
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

NAMES = ("a", "b", "c", "d")


def guo(logits, true, temperature=1.0, bins=15):
    """Equations 1 to 3 of Guo et al. 2017, spelt out."""
    error = 0.0
    rows = softmax(logits.astype(np.float64) / temperature, axis=1)
    for m in range(1, bins + 1):
        inside = [i for i, row in enumerate(rows) if (m - 1) / bins < max(row) <= m / bins]
        if inside:
            accuracy = sum(rows[i].argmax() == true[i] for i in inside) / len(inside)
            confidence = sum(max(rows[i]) for i in inside) / len(inside)
            error += len(inside) / len(rows) * abs(accuracy - confidence)
    return error


def drawn(seed, sharpness=3.0):
    """Return logits that are ``sharpness`` times too sure of labels drawn from the true ones."""
    random = np.random.default_rng(seed)
    honest = random.normal(scale=1.5, size=(500, len(NAMES)))
    true = (honest + random.gumbel(size=honest.shape)).argmax(axis=1)
    return (sharpness * honest).astype(np.float32), true


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_calibration_error_is_that_of_the_paper(seed, temperature):
    logits, true = drawn(seed)
    found = evaluate(logits, [NAMES[i] for i in true], NAMES, temperature)
    assert found.calibration_error == pytest.approx(guo(logits, true, temperature), abs=1e-6)
    assert found.raw_calibration_error == pytest.approx(guo(logits, true), abs=1e-6)
    assert found.temperature == temperature
    log_rows = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    assert found.loss == pytest.approx(-log_rows[np.arange(500), true].mean(), rel=1e-6)


def test_the_comparison_with_the_paper_sees_another_number_of_bins():
    logits, true = drawn(0)
    assert abs(guo(logits, true, 3.0, bins=14) - guo(logits, true, 3.0)) > 1e-3


def test_the_fitted_temperature_calibrates_texts_that_it_has_not_seen():
    logits, true = drawn(2)
    fresh, fresh_true = drawn(3)
    temperature = fit_temperature(logits, true)
    found = evaluate(fresh, [NAMES[i] for i in fresh_true], NAMES, temperature)
    assert found.calibration_error < found.raw_calibration_error / 2


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:120], splits.valid[:60], splits.test[:40])


@pytest.fixture(scope="module")
def calibrated(few, tmp_path_factory):
    """A run whose training fitted a temperature."""
    config = TrainConfig(epochs=6, learning_rate=3e-3)
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    return train(ModelSpec(kind="prefix", max_length=32), few, config, folder)


@pytest.fixture(scope="module")
def exported(calibrated):
    from trainkit.export.bundle_writer import export_all, make_target
    from trainkit.export.settings import ExportSettings
    from trainkit.export.source import open_source

    goal = make_target(str(calibrated.folder), "onnx", ExportSettings(), None)
    (made,) = export_all(open_source(str(calibrated.folder)), [goal])
    return made


def test_a_run_keeps_the_temperature_of_its_validation_texts(few, calibrated):
    kept = checkpoint.load(calibrated.folder)
    raw = kept.classifier()
    columns = [raw.labels.index(example.label) for example in few.valid]
    logits = raw.logits([example.text for example in few.valid])
    temperature = fit_temperature(logits, columns)
    assert abs(math.log(temperature)) > 0.05  # or the rest of these tests would say nothing
    assert kept.checkpoint.temperature == pytest.approx(temperature, rel=1e-6)
    assert raw.temperature == kept.checkpoint.temperature
    metrics = kept.checkpoint.metrics
    assert metrics["valid_calibration_error"] == pytest.approx(
        guo(logits, columns, temperature), abs=1e-6
    )
    assert metrics["valid_raw_calibration_error"] == pytest.approx(guo(logits, columns), abs=1e-6)
    for name, scores in (("valid", calibrated.valid), ("test", calibrated.test)):
        written = json.loads((calibrated.folder / f"{name}.json").read_text())
        assert written == msgspec.to_builtins(scores)
        assert written["temperature"] == kept.checkpoint.temperature
    assert calibrated.no_temperature == ""


@pytest.mark.slow
def test_it_goes_into_the_bundle_and_its_answers(few, calibrated, exported):
    temperature = checkpoint.load(calibrated.folder).checkpoint.temperature
    assert bundle.open_bundle(exported.folder).manifest.temperature == temperature
    texts = [example.text for example in few.test]
    served, raw = (Classifier.load(exported.folder, temperature=t) for t in (None, 1))
    logits = served.logits(texts)
    assert np.array_equal(logits, raw.logits(texts))
    np.testing.assert_allclose(
        served.predict_proba(texts), softmax(logits / temperature, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(raw.predict_proba(texts), softmax(logits, axis=1), rtol=1e-5)
    assert not np.allclose(served.predict_proba(texts), raw.predict_proba(texts), atol=1e-2)
    assert [p.label for p in served(texts)] == [p.label for p in raw(texts)]
    run = open_classifier(calibrated.folder)
    np.testing.assert_allclose(run.predict_proba(texts), served.predict_proba(texts), atol=1e-5)


def test_labels_never_change_at_any_temperature(exported):
    """At 100, float32 probabilities of logits that differ by little are the same number."""
    close = np.array([[1.0, 1.0 + 1e-6, 0, 0, 0, 0]], dtype=np.float32)
    softest = Classifier.load(exported.folder, temperature=100)
    (found,) = softest.predictions(softest.tokens(["Who?"]), close)
    assert found.label == softest.labels[1]


def test_where_none_is_best_none_is_kept(few, tmp_path):
    """The only validation text has a label that is not its own: the less sure, the better."""
    known = few.train[0]
    other = next(name for name in few.label_names if name != known.label)
    new = Splits(few.train, (Example(known.text, other),), few.test)
    config = TrainConfig(epochs=1)
    run = train(ModelSpec(kind="simple", max_length=16), new, config, tmp_path / "run")
    assert "no temperature is best" in run.no_temperature
    assert checkpoint.load(run.folder).checkpoint.temperature is None
    assert b'"temperature"' not in (run.folder / checkpoint.CHECKPOINT).read_bytes()
    assert run.test.temperature == 1
    assert run.test.calibration_error == run.test.raw_calibration_error
    assert checkpoint.load(run.folder).classifier().temperature == 1


def test_a_temperature_that_was_changed_is_noticed(calibrated, tmp_path):
    content = (calibrated.folder / checkpoint.CHECKPOINT).read_text()
    kept = json.loads(content)["temperature"]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / checkpoint.CHECKPOINT).write_text(content.replace(str(kept), str(kept + 1)))
    with pytest.raises(checkpoint.InputError, match="was changed after the training"):
        checkpoint.load(folder)
