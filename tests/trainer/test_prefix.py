"""Prefixes on a small BERT: made by a network and folded, against PEFT's own and its forward."""

import copy
import shutil

import msgspec
import peft
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from transformers import AutoModel, PreTrainedTokenizerFast

from tests.families import random_classifier
from trainkit.cli import cli
from trainkit.data.splits import Splits
from trainkit.data.vocabulary import word_tokenizer
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint, run_folder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-2, average_decay=0.9)


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:48], splits.valid[:24], splits.test[:24])


@pytest.fixture(scope="module")
def base(splits, tmp_path_factory):
    """Return the folder of an encoder of two layers, with a tokenizer of the questions' words."""
    folder = tmp_path_factory.mktemp("prefix") / "base"
    words = word_tokenizer([example.text for example in splits.train], 2)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=48, **special)
    tokenizer.save_pretrained(folder)
    random_classifier("bert", len(tokenizer)).base_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def projected(base):
    return ModelSpec(
        kind="prefix",
        backbone=str(base),
        prefix_length=5,
        prefix_projection=True,
        prefix_hidden=24,
    )


def weights(folder):
    return safetensors.torch.load_file(checkpoint.weights_path(folder))


def logits(new, examples):
    ids, mask, _ = new.encoder.encode([example.text for example in examples])
    with torch.inference_mode():
        return new.model.eval()(torch.from_numpy(ids), torch.from_numpy(mask))


def test_a_projected_prefix_is_what_peft_makes(projected, few):
    """PEFT's prefix encoder with the same weights, cut up as PEFT cuts it."""
    encoder = make_model(projected, few).model
    ours = encoder.projection
    length, layers, _, heads, size = ours.shape
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=length,
        token_dim=heads * size,
        num_layers=layers,
        encoder_hidden_size=24,
        prefix_projection=True,
    )
    theirs = peft.PrefixEncoder(config)
    theirs.embedding.weight.data.copy_(ours.prefix)
    theirs.transform.load_state_dict(ours.network.state_dict())
    expected = theirs(torch.arange(length)[None]).view(length, layers * 2, heads, size)
    ours.fill(encoder.prefixes)
    for number, prefix in enumerate(encoder.prefixes):
        torch.testing.assert_close(prefix.key, expected[:, 2 * number].transpose(0, 1))
        torch.testing.assert_close(prefix.value, expected[:, 2 * number + 1].transpose(0, 1))
    assert len(encoder.prefixes) == layers


def test_folding_keeps_every_logit_to_the_bit(projected, few):
    new = make_model(projected, few)
    before, state = logits(new, few.test), new.model.state_to_save()
    new.model.finalize()
    assert torch.equal(logits(new, few.test), before)
    assert {n: t.shape for n, t in new.model.trained_state().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert all(torch.equal(t, state[name]) for name, t in new.model.trained_state().items())
    with torch.no_grad():  # and the comparison is able to fail
        new.model.prefixes[0].key[0, 0, 0] += 1
    assert not torch.equal(logits(new, few.test), before)


def test_a_run_keeps_plain_keys_and_values_alone(projected, few, tmp_path):
    run = train(projected, few, CONFIG, tmp_path / "projected")
    plain = msgspec.structs.replace(projected, prefix_projection=False, prefix_hidden=None)
    kept = {name: t.shape for name, t in weights(run.folder).items()}
    other = train(plain, few, CONFIG, tmp_path / "plain").folder
    assert kept == {name: t.shape for name, t in weights(other).items()}
    loaded = checkpoint.load(run.folder)
    trained = loaded._replace(model=run.trained.model)
    assert torch.equal(logits(loaded, few.test), logits(trained, few.test))


def test_the_network_is_trained_through(projected, few):
    """Every weight of the network gets a gradient, the frozen encoder none."""
    new = make_model(projected, few)
    ids, mask, _ = new.encoder.encode([example.text for example in few.train[:8]])
    new.model(torch.from_numpy(ids), torch.from_numpy(mask)).square().sum().backward()
    with_gradient = {n for n, weight in new.model.named_parameters() if weight.grad is not None}
    own = {n for n, _ in new.model.named_parameters() if n.startswith(("projection.", "head."))}
    assert with_gradient == own
    assert all(weight.grad.any() for weight in new.model.projection.parameters())


def keys_and_values(base, ids):
    """What the plain encoder's own projections give for one text: (S, H) each, layer by layer."""
    model, found = AutoModel.from_pretrained(base).eval(), []
    for name, module in model.named_modules():
        if name.endswith((".self.key", ".self.value")):
            module.register_forward_hook(lambda _, inputs, output: found.append(output[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    return found


def test_it_begins_as_tokens_of_training_texts(base, few):
    """Step p of each layer is the same token of one text, as transformers computes it."""
    spec = ModelSpec(kind="prefix", backbone=str(base), prefix_length=5)
    new = make_model(spec, few, CONFIG)
    begun = [part for prefix in new.model.prefixes for part in (prefix.key, prefix.value)]
    rows = new.encoder.token_ids([example.text for example in few.train])
    seen = [keys_and_values(base, row) for row in rows]
    for position in range(5):
        expected = [part[:, position].flatten() for part in begun]  # (H,) of keys, values, keys ...
        near = [
            all(
                torch.allclose(theirs[place], ours, atol=1e-5)
                for theirs, ours in zip(text, expected, strict=True)
            )
            for text in seen
            for place in range(len(text[0]))
        ]
        assert any(near)
        assert not all(near)
    again = make_model(spec, few, CONFIG).model.prefixes[1].value
    assert torch.equal(again, begun[3])
    other = msgspec.structs.replace(CONFIG, seed=1)
    assert not torch.equal(make_model(spec, few, other).model.prefixes[1].value, begun[3])


class CutOffError(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Cut:
    """Ends the training after ``left`` steps."""

    def __init__(self, left):
        self.left = left

    def step(self, *_):
        self.left -= 1
        if not self.left:
            raise CutOffError

    def epoch(self, _):
        pass


def test_a_projected_run_that_was_cut_off_goes_on_to_the_same_weights(projected, few, tmp_path):
    whole = train(projected, few, CONFIG, tmp_path / "whole").folder
    with pytest.raises(CutOffError):
        train(projected, few, CONFIG, tmp_path / "cut", Cut(5), save_every_s=0)
    train(projected, few, CONFIG, tmp_path / "cut", resume=True)
    first, second = weights(whole), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = copy.deepcopy(second)
    changed[next(iter(changed))].flatten()[0] += 1e-6
    assert not all(torch.equal(first[name], changed[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "prefix", "prefix_projection": True}, "goes with --model prefix and a backbone"),
        ({"kind": "simple", "prefix_projection": True}, "goes with --model prefix and a backbone"),
        ({"kind": "prefix", "prefix_hidden": 8}, "give both"),
        ({"kind": "prefix", "prefix_hidden": 0}, "prefix_hidden must be at least 1, not 0"),
    ],
)
def test_settings_of_a_projection_that_contradict_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        ModelSpec(**settings)


def test_the_options_of_a_projection_reach_the_model(base, tmp_path):
    options = ["--prefix-projection", "--prefix-hidden", "8", "--prefix-length", "3"]
    command = ["train", "--data", "sample", "--model", "prefix", "--backbone", str(base)]
    command += ["--epochs", "1", "--runs", str(tmp_path), "--name", "run", "--max-length", "8"]
    done = CliRunner().invoke(cli, command + options)
    assert done.exit_code == 0, done.output
    assert run_folder.read(tmp_path / "run").model.prefix_hidden == 8
    assert weights(tmp_path / "run")["model.encoder.layer.0.prefix.key"].shape[1] == 3


def test_a_text_may_be_longer_than_512_tokens_where_that_is_asked_for(splits, tmp_path):
    words = word_tokenizer([example.text for example in splits.train], 2)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    size = words.get_vocab_size()
    long = random_classifier("bert", size, max_position_embeddings=1024).base_model
    long.save_pretrained(tmp_path)
    spec = ModelSpec(kind="finetune", backbone=str(tmp_path))
    for wanted, limit in ((None, 512), (600, 600), (2000, 1024)):
        new = make_model(msgspec.structs.replace(spec, max_length=wanted), splits)
        assert new.model.config.max_length == new.encoder.max_length == limit


def test_a_training_does_not_go_on_over_another_backbone(base, few, tmp_path):
    """Whose frozen weights are not in its state."""
    moved = shutil.copytree(base, tmp_path / "base")
    spec = ModelSpec(kind="prefix", backbone=str(moved), prefix_length=3)
    with pytest.raises(CutOffError):
        train(spec, few, CONFIG, tmp_path / "run", Cut(2), save_every_s=0)
    words = AutoModel.from_pretrained(moved).config.vocab_size
    other = random_classifier("bert", words).base_model
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight[0, 0] += 1
    other.save_pretrained(moved)
    with pytest.raises(InputError, match=r"was started on another backbone"):
        train(spec, few, CONFIG, tmp_path / "run", resume=True)
    shutil.rmtree(moved)
    shutil.copytree(base, moved)
    assert train(spec, few, CONFIG, tmp_path / "run", resume=True).test.count == 24


def test_a_run_refuses_another_backbone(base, few, tmp_path):
    moved = shutil.copytree(base, tmp_path / "base")
    spec = ModelSpec(kind="prefix", backbone=str(moved), prefix_length=3)
    folder = train(spec, few, CONFIG, tmp_path / "run").folder
    path = moved / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["encoder.layer.1.output.dense.bias"][7] += 0.5
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="other weights than the one that the prefix was trained"):
        checkpoint.load(folder)
    shutil.rmtree(moved)
    with pytest.raises(InputError, match="is not a directory"):
        checkpoint.load(folder)
