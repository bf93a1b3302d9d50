"""Texts to predictions: in order, the same in both runtimes, and without any training library."""

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from scipy.special import softmax

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier, Prediction
from trainkit.serve.bundle import MANIFEST, Serving, open_bundle, write_manifest, write_serving
from trainkit.serve.encoding import TextEncoder, by_length
from trainkit.serve.errors import InputError
from trainkit.serve.forward_pool import split_batches
from trainkit.trainer import checkpoint

TEXTS = [example.text for example in load_sample()[:70]]
TEXTS += [" ".join(TEXTS[:n]) for n in range(1, 20)]  # up to the length limit and beyond
random.Random(0).shuffle(TEXTS)


@pytest.fixture(scope="module")
def classify(tiny_bundles):
    return Classifier.load(tiny_bundles["onnx"], threads=1, temperature=1)


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


def test_a_batch_has_no_more_tokens_than_its_budget_nor_rows_than_its_size(classify):
    seen = []

    def run(batch):
        seen.append(batch.attention_mask.sum(axis=1))
        return classify.run(batch)

    bounded = Classifier(classify.encoder, run, classify.labels, batch_size=10, max_tokens=150)
    np.testing.assert_allclose(bounded.logits(TEXTS), classify.logits(TEXTS), rtol=1e-4, atol=1e-5)
    assert max(map(len, seen)) == 10
    assert min(map(len, seen)) < 5
    assert max(len(batch) * max(batch) for batch in seen) <= 150
    for batch, following in itertools.pairwise(seen):
        assert len(batch) == 10 or (len(batch) + 1) * following[0] > 150  # no room for one more


def test_a_text_over_the_budget_goes_alone(classify):
    small = Classifier(classify.encoder, classify.run, classify.labels, max_tokens=1)
    assert [len(batch) for batch in by_length([5, 0, 0, 3], 32, max_tokens=1)] == [2, 1, 1]
    assert small(TEXTS[:3]) == [classify(text) for text in TEXTS[:3]]


def test_a_batch_in_parts_gives_what_it_gives_whole(classify):
    rows = classify.tokens(TEXTS[:8])
    # Padding on the left, a gap, and a row that shows nothing at all.
    masks = [[0, *[1] * (len(rows[1].ids) - 1)], [1, 0, *[1] * (len(rows[2].ids) - 2)]]
    masks.append([0] * len(rows[3].ids))
    rows[1:4] = [row._replace(mask=mask) for row, mask in zip(rows[1:4], masks, strict=True)]
    batch = classify.encoder.pad(rows)
    shapes = []

    def run(part):
        shapes.append(part.input_ids.shape)
        return classify.run(part)

    whole = classify.run(batch)
    np.testing.assert_allclose(split_batches(run, 40)(batch), whole, rtol=1e-4, atol=1e-5)
    assert len(shapes) > 2
    assert sum(rows for rows, _ in shapes) == 8
    assert max(rows * width for rows, width in shapes if rows > 1) <= 40
    assert len({width for _, width in shapes}) > 1  # cut to the longest of each part

    shapes.clear()
    np.testing.assert_array_equal(split_batches(run, batch.input_ids.size)(batch), whole)
    assert shapes == [batch.input_ids.shape]


def test_without_workers_a_part_is_as_large_as_it_may_be(classify):
    """A short text beside a long one costs a little padding, and not a forward of its own."""
    texts = ["Who ?", "How far is it from Denver to Aspen by car ?"]
    shapes = []

    def run(batch):
        shapes.append(batch.input_ids.shape)
        return classify.run(batch)

    Classifier(classify.encoder, run, classify.labels)(texts)
    assert [rows for rows, _ in shapes] == [2]
    shapes.clear()
    rows = classify.tokens(texts)
    batch = classify.encoder.pad([*[rows[0]] * 15, rows[1]])  # 16 rows, of which one is long
    limit = batch.input_ids.size - 1
    split_batches(run, limit)(batch)
    longest = max(len(row.ids) for row in rows)
    fitting = limit // longest
    assert max(rows for rows, _ in shapes) >= fitting


def test_workers_compute_an_even_share_at_once(classify):
    both = threading.Barrier(2)
    shares = []

    def run(batch):
        shares.append(int(batch.attention_mask.sum()))
        both.wait(timeout=20)  # one alone would wait in vain
        return classify.run(batch)

    equal = [TEXTS[0]] * 12  # two parts, each of half of them
    expected = classify.logits(equal)
    parallel = Classifier(classify.encoder, run, classify.labels, workers=2)
    np.testing.assert_allclose(parallel.logits(equal), expected, rtol=1e-4, atol=1e-5)
    assert shares[0] == shares[1]
    batch = classify.encoder.encode(equal)
    np.testing.assert_allclose(split_batches(run, workers=2)(batch), expected, rtol=1e-4, atol=1e-5)
    assert len(shares) == 4


def test_the_number_of_workers_changes_nothing(classify, tiny_bundles):
    parallel = Classifier.load(tiny_bundles["onnx"], workers=3, temperature=1)
    np.testing.assert_allclose(parallel.logits(TEXTS), classify.logits(TEXTS), rtol=1e-4, atol=1e-5)
    assert parallel("How far is Mars?").label == classify("How far is Mars?").label
    assert parallel.logits([]).shape == (0, len(classify.labels))


def test_one_length_a_batch_where_the_model_reads_its_padding(classify):
    batches = by_length([5, 3, 5, 5, 3, 5], 3, max_tokens=100, equal_lengths=True)
    assert list(batches) == [[1, 4], [0, 2, 3], [5]]

    seen = []

    def run(batch):
        seen.append(batch.attention_mask)
        return classify.run(batch)

    Classifier(classify.encoder, run, classify.labels, equal_lengths=True)(TEXTS)
    assert all(mask.all() for mask in seen)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"max_tokens": 0}, {"threads": -1}, {"temperature": 0.0}, {"workers": 0}],
)
def test_a_setting_that_cannot_be_is_refused(wrong, tiny_bundles):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} must be .*, not"):
        Classifier.load(tiny_bundles["onnx"], **wrong)


def test_a_prediction_says_whether_its_text_was_cut(classify):
    limit = classify.encoder.max_length
    found = classify(["Who " * limit, "Who " * (limit + 1), "Who?"])
    assert [prediction.truncated for prediction in found] == [False, True, False]
    (pair,) = classify([("Who " * limit, "Why?")])
    assert pair.truncated


def test_a_temperature_divides_the_logits(classify, tiny_bundles):
    softer = Classifier.load(tiny_bundles["onnx"], threads=1, temperature=2.5)
    logits = classify.logits(TEXTS)
    assert np.array_equal(softer.logits(TEXTS), logits)
    np.testing.assert_allclose(softer.predict_proba(TEXTS), softmax(logits / 2.5, 1), rtol=1e-5)
    for before, after in zip(classify(TEXTS), softer(TEXTS), strict=True):
        assert after.label == before.label
        assert after.score < before.score


def test_top_k_is_the_best_labels_first(classify):
    few = TEXTS[:9]
    for scores, best in zip(classify.predict_proba(few), classify.top_k(few, 3), strict=True):
        order = np.argsort(-scores)[:3]
        assert [label for label, _ in best] == [classify.labels[i] for i in order]
        assert [score for _, score in best] == scores[order].tolist()
    assert classify.top_k(few[0], 3) == classify.top_k([few[0]], 3)[0]
    assert len(classify.top_k(few[0], 99)) == 6
    assert classify.top_k([], 1) == []
    with pytest.raises(InputError, match="k must be at least 1, not 0"):
        classify.top_k(few, 0)


def test_the_labels_above_a_threshold(classify):
    several = Classifier(
        classify.encoder, classify.run, classify.labels, "multi_label_classification"
    )
    scores = several.predict_proba(TEXTS)
    logits = classify.logits(TEXTS)
    assert several.top_k(TEXTS[0], 1)[0].label == classify(TEXTS[0]).label
    for row, found in zip(logits, several.labels_above(TEXTS), strict=True):
        assert {label for label, _ in found} == {several.labels[i] for i in np.flatnonzero(row > 0)}
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
    middle = dict(zip(several.labels, np.median(scores, axis=0).tolist(), strict=True))
    counts = dict.fromkeys(several.labels, 0)
    for found in several.labels_above(TEXTS, middle):
        for label, score in found:
            counts[label] += 1
            assert score > middle[label]
    assert list(counts.values()) == (scores > np.median(scores, axis=0)).sum(axis=0).tolist()
    assert several.labels_above(TEXTS[0], 1.0) == []
    with pytest.raises(InputError, match="name 'NUMBER', which the model does not have"):
        several.labels_above(TEXTS, {"NUMBER": 0.2})
    with pytest.raises(InputError, match="for multi-label models, and this one is single_label"):
        classify.labels_above(TEXTS)


def test_a_regression_has_neither_ranks_nor_a_temperature(classify):
    parts = (classify.encoder, lambda batch: classify.run(batch)[:, :1], ["value"], "regression")
    value = Classifier(*parts)
    assert value("Who?").score == value.logits(["Who?"])[0, 0]
    with pytest.raises(InputError, match="gives a value and no labels to rank"):
        value.top_k("Who?", 1)
    with pytest.raises(InputError, match="no probabilities to calibrate"):
        Classifier(*parts, temperature=2.0)


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


@pytest.mark.parametrize("wrong", [None, 3, b"Who?", ("Who?",), ("Who?", None), ["a", "b", "c"]])
def test_what_is_no_text_is_counted_out(wrong, classify):
    with pytest.raises(InputError, match="text 2 of 2 is neither a text nor a tuple of two texts"):
        classify(["Who?", wrong])


def test_one_text_is_no_list_of_its_letters(classify):
    with pytest.raises(InputError, match="texts must be a list"):
        classify.predict_proba("Who?")


def test_threads_share_a_classifier(classify):
    """Each asks for texts of its own, over and over: an answer to another's would show."""
    parts = [TEXTS[n::8] for n in range(8)] * 5
    expected = [classify(part) for part in parts]
    assert len({prediction.score for part in expected[:8] for prediction in part}) > 80
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(classify, parts)) == expected


def slowed(classify, before):
    """Return ``classify`` with ``before`` called ahead of each batch."""

    def run(batch):
        before()
        return classify.run(batch)

    return Classifier(classify.encoder, run, classify.labels, max_tokens=classify.max_tokens)


def test_the_event_loop_goes_on_while_it_computes(classify):
    slow = slowed(classify, lambda: time.sleep(0.3))

    async def ticks_of(call):
        ticks = 0
        while not call.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    async def main():
        call = asyncio.create_task(slow.async_call(TEXTS[:9]))
        assert await ticks_of(call) >= 5
        assert call.result() == classify(TEXTS[:9])
        one, many = await asyncio.gather(slow.async_call("Who?"), slow.async_call(["Who?"]))
        assert [one] == many == [classify("Who?")]
        with pytest.raises(InputError, match="text 1 of 1 is empty"):
            await slow.async_call([""])

    asyncio.run(main())


def test_a_cancelled_call_leaves_the_later_ones_alone(classify):
    begun, may_end = threading.Event(), threading.Event()

    def before():
        begun.set()
        assert may_end.wait(10)

    slow = slowed(classify, before)

    async def main():
        call = asyncio.create_task(slow.async_call("How far is Mars?"))
        await asyncio.to_thread(begun.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        later = asyncio.create_task(slow.async_call(TEXTS[:9]))
        may_end.set()
        assert await later == classify(TEXTS[:9])

    asyncio.run(main())


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


def rename_an_operator(folder):
    """Name one operator otherwise, and seal the bundle again: its hashes fit."""
    model = onnx.load(folder / "model.onnx")
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "Swirl"
    manifest = open_bundle(folder).manifest
    onnx.save(model, folder / "model.onnx")
    write_manifest(folder, manifest)


def change_a_byte(folder):
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def raise_the_format(folder):
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps(manifest | {"format_version": 99, "new": "field"}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rename_an_operator, r"onnx/model\.onnx cannot be opened by ONNX .*No Op .* for Swirl"),
        (change_a_byte, r"onnx/model\.onnx is not the file that was exported .*sha256"),
        (raise_the_format, r"onnx/trainkit\.json has bundle format 99, this trainkit reads \d+;"),
    ],
)
def test_a_bundle_that_cannot_serve_is_refused_before_the_first_request(damage, told, copied):
    folder = copied("onnx")
    Classifier.load(folder, threads=1)
    damage(folder)
    with pytest.raises(InputError, match=told) as caught:
        Classifier.load(folder, threads=1)
    assert "\n" not in str(caught.value)


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
    assert Classifier.load(folder, workers=2).batch_size == 5
    assert opened.pop() == {"threads": 1, "providers": ("CUDAExecutionProvider",)}
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
    assert not {"asyncio", "ssl"} & set(modules)  # memory and a start that only servers need


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
    with pytest.raises(
        AssertionError, match=r"needs torch; run: pip install 'trainkit-onnx\[train\]'"
    ):
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
