"""A Triton model repository, checked as Triton's ONNX Runtime backend checks it when it loads."""

import json
import re

import numpy as np
import onnxruntime as ort
import pytest

from trainkit.export.triton import write_repository
from trainkit.serve.bundle import BundleFiles, Tensor, open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError

ONNX_TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}
QUESTIONS = ["How far is Mars?", "Who wrote the Odyssey, and where was the author born?"]


@pytest.fixture(scope="module")
def bundle(tiny_bundles):
    return open_bundle(tiny_bundles["onnx"])


@pytest.fixture(scope="module")
def model(bundle, tmp_path_factory):
    """Return the model's folder in a repository."""
    return write_repository(bundle, tmp_path_factory.mktemp("triton") / "models", name="questions")


def changed(bundle, **fields):
    manifest = bundle.manifest
    values = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return BundleFiles(bundle.folder, type(manifest)(**values | fields))


def read(config):
    """Parse text format: a message as a dict from field to the list of its values."""
    messages = [{}]
    for line in config.splitlines():
        if line.endswith("{"):
            messages.append({})
            messages[-2].setdefault(line.split()[0], []).append(messages[-1])
        elif line.strip() == "}":
            messages.pop()
        else:
            name, value = line.strip().split(": ", 1)
            quoted = value.startswith('"') or re.fullmatch(r"-?\d+", value)
            messages[-1].setdefault(name, []).append(json.loads(value) if quoted else value)
    (root,) = messages
    return root


def refusals(config, session):
    """List what the backend would refuse: number, names, dtypes and dims of inputs and outputs."""
    found = []
    for kind, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        by_name = {tensor.name: tensor for tensor in tensors}
        if kind == "input" and len(config[kind]) != len(by_name):
            found.append(f"{len(config[kind])} inputs")
        for entry in config[kind]:
            tensor = by_name.get(entry["name"][0])
            if tensor is None:
                found.append(f"no {kind} {entry['name'][0]}")
                continue
            if ONNX_TYPES[entry["data_type"][0]] != tensor.type:
                found.append(f"{kind} {tensor.name} is {tensor.type}")
            shape = [-1 if isinstance(axis, str) else axis for axis in tensor.shape]
            if shape[0] != -1 or shape[1:] != entry["dims"]:
                found.append(f"{kind} {tensor.name} has shape {shape}")
    return found


@pytest.fixture(scope="module")
def session(model):
    return ort.InferenceSession(str(model / "1" / "model.onnx"))


def test_the_backend_would_load_it(model, session):
    config = read((model / "config.pbtxt").read_text())
    assert config["name"] == [model.name]
    assert config["platform"] == ["onnxruntime_onnx"]
    assert config["max_batch_size"] == [64]
    assert refusals(config, session) == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("input_ids", "ids", "no input ids"),
        ("TYPE_FP32", "TYPE_INT64", "output logits is tensor(float)"),
        ("dims: 6", "dims: 5", "output logits has shape [-1, 6]"),
        ("dims: -1", "dims: 12", "input input_ids has shape [-1, -1]"),
    ],
)
def test_a_config_of_another_model_would_be_refused(model, session, old, new, reason):
    config = (model / "config.pbtxt").read_text()
    assert reason in refusals(read(config.replace(old, new)), session)


def test_the_labels_file_has_the_labels_in_the_order_of_the_logits(model, bundle):
    config = read((model / "config.pbtxt").read_text())
    (name,) = config["output"][0]["label_filename"]
    assert (model / name).read_text().splitlines() == list(bundle.manifest.labels)


def test_the_warmup_is_a_request_that_the_model_answers(model, session):
    config = read((model / "config.pbtxt").read_text())
    assert [warmup["batch_size"] for warmup in config["model_warmup"]] == [[1], [64]]
    for warmup in config["model_warmup"]:
        inputs = {}
        for entry in warmup["inputs"]:
            (value,) = entry["value"]
            content = (model / "warmup" / value["input_data_file"][0]).read_bytes()
            inputs[entry["key"][0]] = np.frombuffer(content, "<i8").reshape(1, *value["dims"])
        assert inputs["attention_mask"].all()
        assert np.isfinite(session.run(["logits"], inputs)[0]).all()


def test_a_client_that_pads_to_one_length_gets_the_classifiers_logits(model, session, bundle):
    """Only from what lies in the model's folder; so that Triton can batch unequal texts."""
    manifest = json.loads((model / "trainkit.json").read_bytes())
    encoder = TextEncoder.load(model / "tokenizer.json", manifest["max_length"], manifest["pad_id"])
    inputs = {
        "input_ids": np.full((2, 32), manifest["pad_id"], np.int64),
        "attention_mask": np.zeros((2, 32), np.int64),
    }
    for row, ids in enumerate(encoder.token_ids(QUESTIONS)):
        inputs["input_ids"][row, : len(ids)] = ids
        inputs["attention_mask"][row, : len(ids)] = 1
    logits = session.run(["logits"], inputs)[0]
    expected = Classifier.load(bundle.folder, threads=1).logits(QUESTIONS)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_beside_the_graph_go_with_it(bundle, tmp_path, copied):
    folder = copied("onnx")
    (folder / "model.onnx.data").write_bytes(b"weights")
    files = bundle.manifest.files | {"model.onnx.data": bundle.manifest.files["model.onnx"]}
    large = changed(bundle, files=files)._replace(folder=folder)
    model = write_repository(large, tmp_path / "models", name="large")
    assert sorted(path.name for path in (model / "1").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]


def test_a_model_with_token_types_gets_three_inputs(bundle, tmp_path):
    types = Tensor("token_type_ids", "int64", ("batch", "sequence"))
    pairs = changed(bundle, inputs=(*bundle.manifest.inputs, types))
    model = write_repository(pairs, tmp_path / "models", name="pairs")
    config = read((model / "config.pbtxt").read_text())
    assert [entry["name"][0] for entry in config["input"]][2:] == ["token_type_ids"]
    assert (model / "warmup" / "token_type_ids").is_file()


def test_a_model_that_exists_is_replaced_only_with_force(bundle, tmp_path):
    repository = tmp_path / "models"
    (repository / "other").mkdir(parents=True)
    write_repository(bundle, repository, name="questions")
    with pytest.raises(InputError, match="exists already"):
        write_repository(bundle, repository, name="questions")
    write_repository(bundle, repository, name="questions", max_batch_size=8, force=True)
    assert "max_batch_size: 8\n" in (repository / "questions" / "config.pbtxt").read_text()
    with pytest.raises(InputError, match="is not a bundle"):
        write_repository(bundle, repository, name="other", force=True)
    assert sorted(path.name for path in repository.iterdir()) == ["other", "questions"]


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("a/b", {}, "'a/b' cannot be a model's name"),
        ("", {}, "cannot be a model's name"),
        (".hidden", {}, "cannot be a model's name"),
        ("torch", {"format": "torchscript"}, "is a torchscript bundle"),
        ("lines", {"labels": ("one", "two\nthree")}, "is not one line"),
        ("blank", {"labels": ("one", "")}, "is not one line"),
        ("ends", {"labels": ("one\n", "two")}, "is not one line"),
    ],
)
def test_what_triton_cannot_take_is_refused(bundle, tmp_path, name, fields, told):
    with pytest.raises(InputError, match=told):
        write_repository(changed(bundle, **fields), tmp_path / "models", name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_size_of_nothing_is_refused(bundle, tmp_path):
    with pytest.raises(InputError, match="max_batch_size must be at least 1, not 0"):
        write_repository(bundle, tmp_path / "models", name="none", max_batch_size=0)
