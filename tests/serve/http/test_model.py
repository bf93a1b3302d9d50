"""A bundle served: the classifier's own answers whatever happens beside them, and hot reload."""

import asyncio
import functools
import logging
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.bundle import Serving, open_bundle, write_manifest, write_serving
from trainkit.serve.encoding import Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.http import model as model_module
from trainkit.serve.http.exceptions import (
    DeadlineError,
    InferenceError,
    QueueFullError,
    UnavailableError,
)
from trainkit.serve.http.model import Model, Models
from trainkit.serve.http.model_worker import ProcessSpec
from trainkit.serve.http.settings import Settings

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle"
TEXTS = [example.text for example in load_sample()[:120]]
SETTINGS = Settings(threads=1)


@pytest.fixture(scope="module")
def expected():
    return Classifier.load(GOLDEN, threads=1).logits(TEXTS)


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "bundle")


def changed(folder, **fields):
    """Seal the manifest with other fields: another version of the same model."""
    write_manifest(folder, msgspec.structs.replace(open_bundle(folder).manifest, **fields))


def served(scenario, folder=GOLDEN, settings=SETTINGS):
    async def main():
        model = await Model.load("golden", folder, settings)
        try:
            return await scenario(model)
        finally:
            await model.close()

    return asyncio.run(main())


def several(scenario, **folders):
    async def main():
        models = await Models.load(folders, SETTINGS)
        try:
            return await scenario(models)
        finally:
            await models.close()

    return asyncio.run(main())


async def ask(model, start, stop, expected):
    """Classify some of the texts and compare."""
    answer = await model.infer(await model.tokens(TEXTS[start:stop]))
    np.testing.assert_allclose(answer.logits, expected[start:stop], atol=1e-5)
    assert answer.queue_s >= 0
    assert answer.infer_s > 0


def parts(count):
    """Return ``count`` pieces of the texts, one to 30 long, at random."""
    draw = random.Random(1)
    starts = [draw.randrange(len(TEXTS) - 30) for _ in range(count)]
    return [(start, start + draw.choice([1, 1, 2, 30])) for start in starts]


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 40}, {"batch_rows": 3}])
def test_answers_are_the_classifiers_whatever_runs_beside_them(changes, expected):
    async def scenario(model):
        await asyncio.gather(*(ask(model, *part, expected) for part in parts(100)))
        await ask(model, 0, len(TEXTS), expected)
        assert model.stats() == {"queued_rows": 0, "queued_tokens": 0, "restarts": 0}

    served(scenario, settings=msgspec.structs.replace(SETTINGS, **changes))


def test_what_it_says_of_itself():
    async def scenario(model):
        manifest = open_bundle(GOLDEN).manifest
        assert model.ready
        assert model.manifest == manifest
        assert model.version == manifest.sha256[:12]
        assert model.max_length == 24
        assert model.vocabulary_size == model.classifier.encoder.tokenizer.get_vocab_size()
        assert (await model.infer([])).logits.shape == (0, 6)
        with pytest.raises(InputError, match="text 2 of 2 is empty"):
            await model.tokens(["Who?", " "])
        with pytest.raises(DeadlineError):
            await model.infer(await model.tokens(["Who?"]), timeout_s=0)
        await model.close()
        assert not model.ready
        with pytest.raises(UnavailableError):
            await model.infer([Tokens([5], [0])])

    served(scenario)


@pytest.mark.parametrize(
    ("number", "within_s"), [(signal.SIGKILL, 5), (signal.SIGSTOP, 8)], ids=["killed", "stopped"]
)
def test_no_answer_is_lost_or_wrong_when_the_process_goes_in_the_middle(number, within_s, expected):
    async def scenario(model):
        asking = [asyncio.create_task(ask(model, *part, expected)) for part in parts(400)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        os.kill(model.pid, number)
        assert not all(task.done() for task in asking)
        async with asyncio.timeout(within_s):
            await asyncio.gather(*asking)
        assert model.stats()["restarts"] == 1

    served(scenario)


def test_only_the_request_that_the_session_refuses_gets_an_error(expected):
    async def scenario(model):
        asking = [ask(model, *part, expected) for part in parts(60)]
        poison = [Tokens([5, 10**6], [0, 0])]
        *_, found = await asyncio.gather(
            *asking[:30], *asking[30:], model.infer(poison), return_exceptions=True
        )
        assert isinstance(found, InferenceError)
        assert "Gather" in str(found)

    served(scenario)


CRASHES = """
import os, signal, sys
from trainkit.serve import onnx_session
from trainkit.serve.http import model_worker

sound = onnx_session.onnx_runner

def onnx_runner(*arguments, **settings):
    run = sound(*arguments, **settings)

    def crashes(batch):
        if (batch.input_ids == 150).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return run(batch)

    return crashes

onnx_session.onnx_runner = onnx_runner
model_worker.main(sys.argv[1:])
"""


def test_only_the_request_that_kills_the_process_gets_an_error(expected, monkeypatch):
    program = (sys.executable, "-c", CRASHES)
    monkeypatch.setattr(
        model_module, "ProcessSpec", functools.partial(ProcessSpec, program=program)
    )

    async def scenario(model):
        crash = [Tokens([150], [0])]
        asking = [ask(model, *part, expected) for part in parts(30)]
        found = await asyncio.gather(
            *asking, model.infer(crash), model.infer(crash), return_exceptions=True
        )
        assert [type(error) for error in found] == [type(None)] * 30 + [InferenceError] * 2

    served(scenario)


def test_it_comes_back_when_its_folder_is_gone(bundle, expected):
    async def scenario(model):
        shutil.rmtree(bundle)
        os.kill(model.pid, signal.SIGKILL)
        await ask(model, 0, 9, expected)

    served(scenario, bundle)


def test_other_weights_beside_the_graph_are_not_taken_when_it_comes_back(bundle, expected):
    """A process that maps them is started by path; they may be another version's by then."""
    import onnx_ir

    manifest = open_bundle(bundle).manifest
    graph = onnx_ir.load(bundle / "model.onnx")
    onnx_ir.save(graph, bundle / "model.onnx", external_data="model.onnx.data")
    write_manifest(bundle, manifest)

    async def scenario(model):
        await ask(model, 0, 9, expected)
        weights = (bundle / "model.onnx.data").rename(bundle / "kept")
        (bundle / "model.onnx.data").write_bytes(bytes(reversed(weights.read_bytes())))
        os.kill(model.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="did not come back in 2 s"):
            await ask(model, 0, 9, expected)
        weights.replace(bundle / "model.onnx.data")
        await asyncio.sleep(1)
        await ask(model, 0, 9, expected)

    served(scenario, bundle, msgspec.structs.replace(SETTINGS, timeout_s=2))


def test_a_reload_under_load_loses_nothing(bundle, expected, caplog, monkeypatch):
    monkeypatch.setattr(model_module, "QUIET_S", 0.2)

    async def scenario(models):
        swapped = asyncio.Event()
        versions = set()

        async def client():
            while not swapped.is_set():
                model = models["one"]
                versions.add(model.version)
                await ask(model, 0, 5, expected)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        old = models["one"]
        held = await old.tokens(TEXTS[:3])
        told = []
        models.observe(lambda model, facts: told.append((model.version, facts.rows)))
        changed(bundle, labels=tuple("abcdef"))
        new = await models.reload("one")
        assert models["one"] is new
        # A request that has the old one still gets its answer from it.
        np.testing.assert_allclose((await old.infer(held)).logits, expected[:3], atol=1e-5)
        await ask(new, 0, 5, expected)
        swapped.set()
        await asyncio.gather(*clients)
        assert new.version != old.version
        assert {version for version, _ in told} >= {new.version, old.version}
        assert versions == {new.version, old.version}
        while old.pid is not None:  # it goes once nobody asks it
            await asyncio.sleep(0.02)
        assert not old.ready

    with caplog.at_level(logging.INFO, "trainkit.serve"):
        several(scenario, one=bundle)
    assert "replaces" in caplog.text
    assert "has other labels" in caplog.text


def damage(folder):
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def no_model(folder):
    manifest = open_bundle(folder).manifest
    (folder / "model.onnx").write_bytes(b"no model")
    write_manifest(folder, manifest)


def other_columns(folder):
    changed(folder, labels=("a", "b"))


def not_finite(folder):
    """Put NaN into the weights: it loads and it runs."""
    import onnx
    from onnx import numpy_helper

    manifest = open_bundle(folder).manifest
    model = onnx.load(folder / "model.onnx")
    weights = next(w for w in model.graph.initializer if w.data_type == 1 and len(w.dims) == 2)
    weights.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32("nan"), weights.name)
    )
    onnx.save(model, folder / "model.onnx")
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (damage, "is not the file that was exported"),
        (no_model, r"bundle/model\.onnx cannot be opened by ONNX Runtime"),
        (other_columns, r"does not run \(the logits are \(1, 6\), and \(1, 2\) was expected\)"),
        (not_finite, r"does not run \(some logits are NaN or infinite\)"),
        (shutil.rmtree, "is not a bundle"),
    ],
)
def test_a_bad_bundle_is_refused_and_the_old_one_stays(spoil, told, bundle, expected):
    async def scenario(models):
        old = models["one"]
        spoil(bundle)
        with pytest.raises(InputError, match=told):
            await models.reload("one")
        assert models["one"] is old
        await ask(old, 0, 5, expected)

    several(scenario, one=bundle)


def test_one_that_is_refused_leaves_none_running(bundle, monkeypatch):
    damage(bundle)
    loaded = []
    load = Model.load

    async def watched(*arguments):
        loaded.append(await load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(Model, "load", watched)

    async def main():
        with pytest.raises(InputError, match="is not the file that was exported"):
            await Models.load({"good": GOLDEN, "bad": bundle}, SETTINGS)
        assert [(model.pid, model.ready) for model in loaded] == [(None, False)]

    asyncio.run(main())


def test_models_are_found_by_name(bundle, expected):
    async def scenario(models):
        assert list(models) == ["one", "two"]
        assert models["one"].pid != models["two"].pid
        await asyncio.gather(*(ask(model, 0, 5, expected) for model in models.values()))
        with pytest.raises(InputError, match="three is not served; served are: one, two"):
            await models.reload("three")

    several(scenario, one=bundle, two=GOLDEN)


def test_a_reload_is_given_up_when_the_server_stops(bundle):
    async def main():
        models = await Models.load({"one": bundle}, SETTINGS)
        loading = asyncio.create_task(models.reload("one"))
        await asyncio.sleep(0)
        await models.close()
        with pytest.raises(UnavailableError):
            await loading

    asyncio.run(main())


def test_a_torchscript_bundle_is_sent_elsewhere(bundle):
    changed(bundle, format="torchscript")
    with pytest.raises(InputError, match="needs torch; serve one made with: trainkit export"):
        served(None, bundle)


@pytest.mark.parametrize(
    ("source", "packed"),
    [({"padded_because": None}, True), ({"padded_because": "its convolution"}, False), ({}, False)],
)
def test_a_bundle_says_whether_its_graph_is_packed(source, packed):
    manifest = msgspec.structs.replace(open_bundle(GOLDEN).manifest, source=source)
    assert model_module._policy(manifest, SETTINGS).packed is packed


def test_a_bundle_brings_its_threads_but_not_more_than_there_are_cores(bundle, monkeypatch):
    asked = []
    monkeypatch.setattr(model_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(model_module, "ModelProcess", asked.append)
    for threads in (1, 64):
        write_serving(bundle, Serving(threads=threads, batch_size=8, provider="SomeProvider"))
        model_module._open(bundle, Settings())
    model_module._open(bundle, Settings(threads=3, providers=("CPUExecutionProvider",)))
    assert [(spec.threads, spec.providers[0]) for spec in asked] == [
        (1, "SomeProvider"),
        (2, "SomeProvider"),
        (3, "CPUExecutionProvider"),
    ]


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (16, 15)])
def test_the_front_keeps_a_core_where_two_are_left(cores, threads):
    assert model_module.default_threads(cores) == threads


def test_texts_that_wait_for_the_tokenizer_are_bounded(monkeypatch):
    """One request is always taken; beside it only what may wait."""

    async def scenario(model):
        begun, go_on = threading.Event(), threading.Event()
        tokens = model.classifier.tokens

        def slow(texts):
            begun.set()
            assert go_on.wait(30)
            return tokens(texts)

        monkeypatch.setattr(model.classifier, "tokens", slow)
        long = ["How far is Mars? " * 100]  # 1,700 characters; 8 * 200 may wait
        first = asyncio.ensure_future(model.tokens(long))
        await asyncio.to_thread(begun.wait, 30)
        with pytest.raises(QueueFullError):
            await model.tokens(long)
        go_on.set()
        assert len(await first) == 1
        assert len(await model.tokens(long)) == 1
        await model.close()
        with pytest.raises(UnavailableError):
            await model.tokens(long)

    served(scenario, settings=msgspec.structs.replace(SETTINGS, queue_tokens=200))
