"""Texts to predictions: in order, the same in both runtimes, and without any training library."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier, Prediction
from trainkit.serve.bundle import Serving, write_serving
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint

TEXTS = [example.text for example in load_sample()[:70]]
TEXTS += [" ".join(TEXTS[:n]) for n in range(1, 20)]  # up to the length limit and beyond
random.Random(0).shuffle(TEXTS)


@pytest.fixture(scope="module")
def classify(tiny_bundles):
    return Classifier.load(tiny_bundles["onnx"], threads=1)


def test_results_come_in_the_order_of_the_texts(classify):
    together = classify(TEXTS)
    assert len({prediction.label for prediction in together}) > 1  # or any order would do
    for text, prediction in zip(TEXTS, together, strict=True):
        alone = classify(text)
        assert prediction.label == alone.label
        assert prediction.scores == pytest.approx(alone.scores, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_size_of_a_batch_changes_nothing(batch_size, classify, tiny_bundles):
    other = Classifier.load(tiny_bundles["onnx"], threads=1, batch_size=batch_size)
    np.testing.assert_allclose(other.logits(TEXTS), classify.logits(TEXTS), rtol=1e-4, atol=1e-5)


def test_every_text_goes_to_the_runtime_once_in_batches_of_like_length(tiny_bundles, classify):
    seen = []

    def run(batch):
        seen.append(batch.attention_mask.sum(axis=1))
        return classify.run(batch)

    Classifier(classify.encoder, run, classify.labels, batch_size=10)(TEXTS)
    assert [len(batch) for batch in seen] == [10] * 8 + [9]
    lengths = np.concatenate(seen).tolist()
    assert lengths == sorted(len(row) for row in classify.encoder.token_ids(TEXTS))


def test_probabilities_sum_to_one_and_rank_as_the_logits_do(classify):
    probabilities = classify.predict_proba(TEXTS)
    assert probabilities.shape == (len(TEXTS), 6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.array_equal(probabilities.argmax(axis=1), classify.logits(TEXTS).argmax(axis=1))


def test_probabilities_of_large_logits_are_numbers(classify):
    def run(batch):
        return np.array([[1e4, -1e4, 0, 0, 0, 0]] * len(batch.input_ids), dtype=np.float32)

    extreme = Classifier(classify.encoder, run, classify.labels)
    assert extreme("Who?").scores == dict(zip(classify.labels, [1, 0, 0, 0, 0, 0], strict=True))


def test_one_text_gives_one_prediction_and_a_list_gives_a_list(classify):
    one = classify("How far is Mars?")
    assert isinstance(one, Prediction)
    assert classify(["How far is Mars?"]) == [one]
    assert classify(("How far is Mars?",)) == [one]
    assert one.label == max(one.scores, key=one.scores.get)
    assert one.score == one.scores[one.label]


def test_no_text_gives_no_prediction(classify):
    assert classify([]) == []
    assert classify.logits([]).shape == classify.predict_proba([]).shape == (0, 6)


def test_labels_are_those_of_the_training_in_its_order(classify, tiny_run):
    labels = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert classify.labels == labels == checkpoint.load(tiny_run).classifier().labels
    assert tuple(classify("Who?").scores) == labels


def test_an_empty_text_is_counted_out(classify):
    with pytest.raises(InputError, match="text 2 of 3 is empty"):
        classify(["Who?", "\n", "Why?"])
    with pytest.raises(InputError, match="text 1 of 1 is empty"):
        classify("")


def test_a_text_of_control_characters_alone_still_gets_numbers(classify):
    """It is not blank, but nothing of it is left in the ids."""
    assert classify.encoder.token_ids(["\x01\x02"]) == [[]]
    assert np.isfinite(classify.logits(["\x01\x02", "Who?"])).all()


def test_onnx_answers_as_the_run_does(classify, tiny_run):
    reference = checkpoint.load(tiny_run).classifier()
    assert isinstance(reference.encoder, TextEncoder)
    expected, found = reference.logits(TEXTS), classify.logits(TEXTS)
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    # float32, two layers: rounding shows at 1e-6; a lost mask at 1e-2.
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_torchscript_bundle_is_sent_elsewhere(tiny_bundles):
    with pytest.raises(InputError, match="needs torch; serve one made with: trainkit export"):
        Classifier.load(tiny_bundles["torchscript"])


def test_a_provider_that_is_not_there_is_an_error(tiny_bundles):
    with pytest.raises(InputError, match=r"no NoSuchProvider, only .*CPUExecutionProvider"):
        Classifier.load(tiny_bundles["onnx"], providers=["NoSuchProvider"])


def test_a_bundle_brings_its_threads_batch_size_and_provider(copied, monkeypatch):
    folder = copied("onnx")
    opened = []

    def watched(path, **how):
        opened.append(how)
        return lambda batch: None

    monkeypatch.setattr("trainkit.serve.onnx_session.onnx_runner", watched)
    plain = Classifier.load(folder)
    assert opened.pop() == {"threads": None, "providers": ("CPUExecutionProvider",)}
    assert plain.batch_size == 32
    write_serving(folder, Serving(threads=3, batch_size=5, provider="CUDAExecutionProvider"))
    assert Classifier.load(folder).batch_size == 5
    assert opened.pop() == {"threads": 3, "providers": ("CUDAExecutionProvider",)}
    given = {"threads": 0, "providers": ("CPUExecutionProvider",)}
    assert Classifier.load(folder, batch_size=7, **given).batch_size == 7
    assert opened.pop() == given


# What serving imports, in processes of their own.

TRAINING = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors")

BLOCKED = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TRAINING}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""

SERVE = """
import json, sys
import trainkit.serve
classify = trainkit.serve.Classifier.load(sys.argv[1], threads=1)
labels = [prediction.label for prediction in classify(json.loads(sys.argv[2]))]
print(json.dumps([labels, sorted(sys.modules)]))
"""


def python(program, *arguments):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("before", ["", BLOCKED], ids=["as it is", "blocked"])
def test_serving_needs_no_training_library(before, classify, tiny_bundles):
    output = python(before + SERVE, tiny_bundles["onnx"], json.dumps(TEXTS[:9]))
    labels, modules = json.loads(output)
    assert labels == [prediction.label for prediction in classify(TEXTS[:9])]
    assert not set(TRAINING) & set(modules)


def test_the_command_line_serves_without_training_libraries(tiny_bundles):
    """Also ``verify``: the reference logits lie in the bundle."""
    folder = tiny_bundles["onnx"]
    for arguments in (["predict", folder, "Who?"], ["verify", folder], ["inspect", folder]):
        call = f"from trainkit.cli import cli\ncli({[str(a) for a in arguments]})"
        assert python(BLOCKED + call)


def test_a_missing_extra_is_one_sentence(tiny_bundles):
    call = f"from trainkit.cli import cli\ncli(['predict', {str(tiny_bundles['torchscript'])!r}])"
    block = BLOCKED.replace("ImportError(", "ModuleNotFoundError(name=name, *[").replace(
        'blocked")', 'blocked"])'
    )
    with pytest.raises(AssertionError, match=r"needs torch; run: pip install 'trainkit\[train\]'"):
        python(block + call)


@pytest.mark.parametrize("module", ["trainkit", "trainkit.serve", "trainkit.cli"])
def test_importing_costs_no_library_that_is_not_used_yet(module):
    heavy = (*TRAINING, "numpy", "onnxruntime", "tokenizers", "rich")
    program = f"import sys, {module}\nprint([name for name in {heavy} if name in sys.modules])"
    assert python(program) == "[]\n"


def test_a_name_that_serve_does_not_have_is_an_attribute_error():
    import trainkit.serve

    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        trainkit.serve.Server  # noqa: B018  # the access itself is the test
