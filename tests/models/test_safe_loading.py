"""Folders from strangers: real pickles with a payload, real code, and none of it may run."""

import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from trainkit.models.backbone import load_pretrained
from trainkit.models.safe_loading import check_folder, fetch
from trainkit.serve.errors import InputError

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=16,
)


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


@pytest.fixture
def proof(tmp_path):
    """Return a path where a file appears as soon as something of the stranger's ran."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture
def folder(tmp_path):
    """Return a complete, harmless model folder in safetensors."""
    model = AutoModelForSequenceClassification.from_config(CONFIG)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_zip(payload, path):
    torch.save({"weight": payload}, path)


def write_legacy(payload, path):
    torch.save({"weight": payload}, path, _use_new_zipfile_serialization=False)


def write_bare(payload, path):
    path.write_bytes(pickle.dumps(payload))


def write_tar(payload, path):
    content = pickle.dumps(payload)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_folder_of_safetensors_passes(folder):
    check_folder(folder)
    assert fetch(str(folder)) == folder


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_bare, write_tar])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_pickle_with_a_payload_is_refused_and_not_run(write, name, folder, proof):
    (folder / "model.safetensors").unlink()
    write(Payload(proof), folder / name)
    with pytest.raises(InputError, match=rf"{name}' is a pickle and was not loaded") as refusal:
        check_folder(folder)
    assert len(str(refusal.value).splitlines()) == 1


def test_the_payload_would_run(tmp_path):
    """The test above is worth something: unpickled without care, the same bytes do harm."""
    write_bare(Payload(tmp_path / "harm"), tmp_path / "weights.bin")
    pickle.loads((tmp_path / "weights.bin").read_bytes()).close()
    assert (tmp_path / "harm").exists()


def test_a_pickled_shard_is_refused_under_any_name(folder, proof):
    (folder / "model.safetensors").unlink()
    write_zip(Payload(proof), folder / "part-1.weights")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "part-1.weights"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"part-1.weights' is a pickle.*calls io.open"):
        check_folder(folder)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_of_plain_tensors_passes_and_loads(new_format, folder):
    state = AutoModelForSequenceClassification.from_config(CONFIG).bert.state_dict()
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    model, _ = load_pretrained(str(folder))
    weight = "embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[weight], state[weight])


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off"])
def test_junk_instead_of_weights_is_refused(content, folder):
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match="no plain PyTorch file"):
        check_folder(folder)


def test_a_pickle_of_something_harmless_is_no_state_dict(folder):
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than named tensors"):
        check_folder(folder)


def test_what_a_trainer_leaves_behind_may_stay(folder, proof):
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        write_bare(Payload(proof), folder / name)
    load_pretrained(str(folder))


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "..", "a/b.bin", 7, None])
def test_a_shard_list_that_leaves_the_folder_is_refused(name, folder):
    index = {"weight_map": {"classifier.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside of its folder"):
        check_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    if name is not None:
        change(folder / "config.json", transformers_weights=name)
        with pytest.raises(InputError, match="takes its weights from"):
            check_folder(folder)


CODE = {
    "auto_map": {"AutoModel": "stranger.Model"},
    "attn_implementation": "stranger/kernel",
    "_attn_implementation": "stranger/kernel:fast",
    "experts_implementation": {"": "stranger/kernel"},
    "text_config": {"auto_map": {"AutoConfig": "stranger.Config"}},
}


@pytest.mark.parametrize("key", CODE)
def test_code_of_a_stranger_runs_only_when_trusted(key, folder, proof, monkeypatch):
    """And nobody is asked: transformers would, on a terminal, for fifteen seconds."""
    (folder / "stranger.py").write_text(f"open({str(proof)!r}, 'w')\n")
    change(folder / "config.json", **{key: CODE[key]})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(InputError, match="--trust-remote-code if you trust its author"):
        load_pretrained(str(folder))
    check_folder(folder, trust_remote_code=True)


def test_code_of_a_tokenizer_or_an_adapter_counts_too(folder):
    for name in ("tokenizer_config.json", "adapter_config.json"):
        (folder / name).write_text('{"auto_map": {"AutoTokenizer": ["a--b.C", null]}}')
        with pytest.raises(InputError, match=rf"{name}'.*--trust-remote-code"):
            check_folder(folder)
        (folder / name).unlink()


def test_a_module_that_peft_would_import_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"megatron_config": {"a": 1}}')
    with pytest.raises(InputError, match="Megatron"):
        check_folder(folder, trust_remote_code=True)


@pytest.mark.parametrize("content", ["{", "", "\xff", "[" * 100_000])
def test_a_configuration_that_is_no_json_is_refused(content, folder):
    (folder / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="is not a JSON file"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.pkl", "vocab.pkl", "vocab.bin", "Vocab.PT"])
def test_a_pickled_tokenizer_is_refused(name, folder, proof):
    write_bare(Payload(proof), folder / name)
    with pytest.raises(InputError, match=rf"{name}' is a tokenizer in a pickle"):
        check_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    check_folder(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    (tmp_path / "private.txt").write_text("mine")
    (folder / "vocab.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(InputError, match="link to a file outside"):
        check_folder(folder)
    (folder / "vocab.txt").unlink()
    (folder / "weights.safetensors").symlink_to("model.safetensors")
    check_folder(folder)
    (tmp_path / "latest").symlink_to(folder)
    check_folder(tmp_path / "latest")


def test_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        check_folder(folder)


def test_a_name_with_a_line_break_stays_on_one_line(folder):
    (folder / "a\nError: fine").symlink_to("/etc/hostname")
    with pytest.raises(InputError) as refusal:
        check_folder(folder)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """Put the folder into a hub cache as ``someone/model``, with links to blobs, and go offline."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_is_a_folder_like_any_other(cached, proof):
    assert fetch("someone/model") == cached
    load_pretrained("someone/model")
    (cached / "stranger.py").write_text(f"open({str(proof)!r}, 'w')\n")
    change(cached / "config.json", auto_map={"AutoModel": "stranger.Model"})
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_pretrained("someone/model")


def test_a_link_out_of_the_hubs_cache_is_not_followed(cached, tmp_path):
    (tmp_path / "private.txt").write_text("mine")
    (cached / "vocab.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(InputError, match="link to a file outside"):
        fetch("someone/model")


def test_what_is_neither_here_nor_on_the_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", str(tmp_path / "nowhere"), "a\nb", ""):
        with pytest.raises(InputError, match=r"adapter .* is not a directory"):
            fetch(name, "adapter")
