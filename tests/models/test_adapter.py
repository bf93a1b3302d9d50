"""PEFT adapters: what is folded and exported against the PEFT model that was in memory."""

import copy
import json
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from trainkit.export.quiet import quiet_exporter
from trainkit.models.adapter import adapter_effect, load_adapter
from trainkit.models.hub_classifier import Forward
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, InputError

peft = pytest.importorskip("peft")

# PEFT asks transformers 5 for an old name while a test makes an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # small weights would hide a wrong mask under the tolerance
}
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "mpnet": {"pad_token_id": 1},
    "qwen2": {"num_key_value_heads": 2},
}
PREFIX = {"num_virtual_tokens": 5, "token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "mpnet": ["attn.q", "attn.v"],
    "qwen2": ["q_proj", "v_proj"],
}
KINDS = {
    "lora": lambda family: peft.LoraConfig(
        task_type="SEQ_CLS",
        target_modules=TARGETS[family],
        init_lora_weights=False,
    ),
    "dora": lambda family: peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS[family][:2], use_dora=True
    ),
    "ia3": lambda family: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=TARGETS[family][:2], feedforward_modules=[]
    ),
    "prefix": lambda _: peft.PrefixTuningConfig(task_type="SEQ_CLS", **PREFIX),
    "projected prefix": lambda _: peft.PrefixTuningConfig(
        task_type="SEQ_CLS", prefix_projection=True, encoder_hidden_size=16, **PREFIX
    ),
    "p-tuning": lambda _: peft.PromptEncoderConfig(
        task_type="SEQ_CLS", encoder_hidden_size=16, **PREFIX
    ),
    "p-tuning lstm": lambda _: peft.PromptEncoderConfig(
        task_type="SEQ_CLS",
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        **PREFIX,
    ),
    "prompt": lambda _: peft.PromptTuningConfig(task_type="SEQ_CLS", **PREFIX),
}
PROMPTS = ["p-tuning", "p-tuning lstm", "prompt"]
PAIRS = [
    *(("bert", kind) for kind in KINDS),
    *(("roberta", kind) for kind in KINDS),
    *(("distilbert", kind) for kind in ["lora", "dora", "ia3", *PROMPTS]),
    *(("mpnet", kind) for kind in ["lora", *PROMPTS]),
]
EXPORTED = [
    ("roberta", "prefix"),
    ("distilbert", "p-tuning"),
    pytest.param(("bert", "lora"), marks=pytest.mark.slow),
    pytest.param(("bert", "projected prefix"), marks=pytest.mark.slow),
]
MASKS = {
    "full": [[1] * 8] * 3,
    "right": [[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7],
    "left": [[1] * 8, [0] * 3 + [1] * 5, [0] * 7 + [1]],
    "gapped": [[1, 0, 1, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1, 1]],
    "one row blank": [[1] * 8, [0] * 8, [1] * 4 + [0] * 4],
    "one token": [[1]],
    "other sizes": [[1] * 13] * 4 + [[0] * 2 + [1] * 11],
}


def save_base(folder, family, **changes):
    """Save a plain encoder, as pretrained ones are: without a head."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family] | changes)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def save_adapter(folder, base, kind, labels=3):
    """Save an adapter that does something, and return the model that it was saved from."""
    family = AutoConfig.from_pretrained(base).model_type
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, KINDS[kind](family)).eval()
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from family and kind to adapter folder and the model before saving."""
    cache = {}

    def make(family, kind):
        if (family, kind) not in cache:
            place = tmp_path_factory.mktemp("adapter")
            base = save_base(place / "base", family)
            cache[family, kind] = place / "adapter", save_adapter(place / "adapter", base, kind)
        return cache[family, kind]

    return make


@pytest.fixture(scope="module")
def loaded(made):
    """Return a function from family and kind to the loaded adapter."""
    cache = {}

    def load(family, kind):
        if (family, kind) not in cache:
            cache[family, kind] = load_adapter(made(family, kind)[0])
        return cache[family, kind]

    return load


def inputs(family, mask, seed=0):
    """Make real ids under the mask, padding elsewhere, and token types where the family has two."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(mask)
    ids = torch.randint(5, 90, mask.shape, generator=generator)
    ids = torch.where(mask.bool(), ids, FAMILIES[family].get("pad_token_id", 0))
    if family != "bert":
        return ids, mask
    return ids, mask, (torch.arange(mask.shape[1]) > mask.shape[1] // 2).long().expand_as(mask)


def logits(model, *batch):
    with torch.inference_mode():
        return Forward(model)(*batch)


def assert_same(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_logits_are_those_of_peft_before_it_saved(family, kind, made, loaded):
    adapted, before = loaded(family, kind), made(family, kind)[1]
    for mask in MASKS.values():
        batch = inputs(family, mask)
        expected = logits(before, *batch)
        assert_same(logits(adapted.reference, *batch), expected)
        assert_same(logits(adapted.model, *batch), expected)
        assert_same(logits(adapted.model, *batch[:2]), logits(before, *batch[:2]))
    assert not any("peft" in type(module).__module__ for module in adapted.model.modules())
    assert (adapted.padded_because is None) == (family != "mpnet")


def test_what_is_told_about_an_adapter(loaded):
    lora, prefix = loaded("bert", "lora"), loaded("roberta", "prefix")
    assert (lora.kind, prefix.kind) == ("LORA", "PREFIX_TUNING")
    assert (lora.virtual_tokens, prefix.virtual_tokens) == (0, 5)
    # Two layers of keys and values, five of 32 each; a head of one layer and one to three labels.
    assert prefix.trained_parameters == 2 * 2 * 5 * 32 + (32 * 32 + 32) + (32 * 3 + 3)
    assert lora.base_folder.name == "base"
    assert lora.model.config.num_labels == 3


@pytest.fixture(scope="module", params=EXPORTED, ids=" ".join)
def exported(request, made, loaded):
    """Export to ONNX, TorchScript and a torch program: a function from batch to logits of each."""
    family, kind = request.param
    adapted, before = loaded(family, kind), made(family, kind)[1]
    example = inputs(family, MASKS["right"])
    names = ["input_ids", "attention_mask", "token_type_ids"][: len(example)]
    axes = tuple(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for _ in example)
    model = Forward(adapted.model).eval()
    with quiet_exporter(), torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=axes)
        graph = torch.onnx.export(
            program, dynamo=True, opset_version=23, input_names=names, verbose=False
        )
        traced = torch.jit.trace(model, example, check_trace=False)
    session = onnxruntime.InferenceSession(graph.model_proto.SerializeToString())

    def run_onnx(*batch):
        arrays = [tensor.numpy() for tensor in batch]
        return session.run(None, dict(zip(names, arrays, strict=True)))[0]

    return family, before, {"onnx": run_onnx, "torchscript": traced, "pt2": program.module()}


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_exported_logits_are_those_of_peft(exported, mask):
    family, before, runners = exported
    batch = inputs(family, MASKS[mask])
    expected = logits(before, *batch)
    for run in runners.values():
        with torch.inference_mode():
            assert_same(run(*batch), expected)


# What must not go unnoticed.


def test_a_prefix_that_is_left_out_shows(made, loaded):
    batch = inputs("roberta", MASKS["right"])
    model = copy.deepcopy(loaded("roberta", "prefix").model)
    expected = logits(made("roberta", "prefix")[1], *batch)
    for module in model.modules():
        if hasattr(module, "prefix"):
            del module.prefix
    assert (logits(model, *batch) - expected).abs().max() > 1e-2


def test_positions_that_are_not_shifted_show(made, loaded):
    """PEFT's cache moves the text's positions behind the prefix."""
    batch = inputs("bert", MASKS["right"])
    model = copy.deepcopy(loaded("bert", "prefix").model)
    expected = logits(made("bert", "prefix")[1], *batch)
    model.bert.embeddings._forward_pre_hooks.clear()
    assert (logits(model, *batch) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "prefix", "p-tuning"])
def test_a_fold_that_does_nothing_is_refused(kind, made, monkeypatch):
    """The check inside: the base with its head alone, not merged and without virtual tokens."""
    from trainkit.models import adapter, merge_adapter

    def forget(adapted, _):
        model = copy.deepcopy(adapted)
        if kind == "lora":
            return merge_adapter.MergedAdapter(model.unload(), None)
        return merge_adapter.MergedAdapter(merge_adapter._without_peft(model), None)

    monkeypatch.setattr(adapter, "merge", forget)
    with pytest.raises(CheckFailedError, match="does not compute what PEFT does"):
        load_adapter(made("bert", kind)[0])


def test_the_effect_of_an_adapter_is_measured_with_its_own_head(made, loaded):
    ids, mask, types = inputs("bert", MASKS["right"])
    batch = Batch(ids.numpy(), mask.numpy(), types.numpy())
    for kind in ("lora", "ia3", "prefix", "p-tuning"):
        effect = adapter_effect(loaded("bert", kind), batch)
        assert effect["largest_logit_change"] > 1e-2
        assert 0 <= effect["changed_label_share"] <= 1
    assert_same(  # and the adapter is on again
        logits(loaded("bert", "lora").reference, ids, mask, types),
        logits(made("bert", "lora")[1], ids, mask, types),
    )


def test_an_adapter_that_was_never_trained_is_noticed(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS")  # starts with B = 0, so that it adds nothing
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    ids = np.arange(12).reshape(2, 6)
    with pytest.raises(CheckFailedError, match="the adapter changes nothing"):
        adapter_effect(load_adapter(tmp_path / "adapter"), Batch(ids, np.ones_like(ids)))


# The base.


@pytest.fixture
def copied(made, tmp_path):
    """Return a function that copies adapter and base of a kind on BERT into ``tmp_path``."""

    def copy_of(kind, family="bert"):
        shutil.copytree(made(family, kind)[0].parent, tmp_path, dirs_exist_ok=True)
        return tmp_path / "adapter"

    return copy_of


def set_up(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_a_base_is_found_beside_the_adapter_or_named(copied, loaded):
    folder = set_up(copied("lora"), base_model_name_or_path="../base")
    batch = inputs("bert", MASKS["right"])
    expected = logits(loaded("bert", "lora").model, *batch)
    assert_same(logits(load_adapter(folder).model, *batch), expected)
    set_up(folder, base_model_name_or_path="nobody/moved-away")
    base = str(folder.parent / "base")
    assert_same(logits(load_adapter(str(folder), base).model, *batch), expected)
    assert load_adapter(folder, base).base_name == base


@pytest.mark.parametrize("name", ["nobody/no-such-model", None, ""])
def test_a_base_that_is_nowhere_is_asked_for(name, copied, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = set_up(copied("lora"), base_model_name_or_path=name)
    with pytest.raises(InputError, match="hub id of the adapter's base model with --base"):
        load_adapter(folder)


NARROW, SHALLOW = {"hidden_size": 16, "intermediate_size": 24}, {"num_hidden_layers": 1}
DEEP, FEW_HEADS = {"num_hidden_layers": 3}, {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        # What is not here fits: nothing in such an adapter has that axis.
        *(("lora", other) for other in (NARROW, SHALLOW, DEEP)),
        *(("prefix", other) for other in (NARROW, SHALLOW, DEEP, FEW_HEADS)),
        ("p-tuning", NARROW),
    ],
)
def test_another_base_is_refused(kind, other, copied, tmp_path):
    base = save_base(tmp_path / "other", "bert", **other)
    with pytest.raises(InputError, match=r"does not fit the base model .* with --base"):
        load_adapter(copied(kind), str(base))


@pytest.mark.parametrize("kind", ["lora", "prefix", "p-tuning"])
def test_a_base_of_another_family_is_refused(kind, copied, tmp_path):
    base = save_base(tmp_path / "other", "roberta")
    with pytest.raises(InputError, match="does not fit the base model"):
        load_adapter(copied(kind), str(base))


def test_a_base_that_is_an_adapter_itself_is_refused(copied):
    """transformers would follow it to a third model."""
    folder = copied("lora")
    shutil.copy(folder / "adapter_config.json", folder.parent / "base")
    with pytest.raises(InputError, match="is no Hugging Face model"):
        load_adapter(folder, str(folder.parent / "base"))


def test_a_decoder_learns_its_padding_from_the_tokenizer(tmp_path, word_encoder):
    """A decoder's configuration has no padding id as a rule, and its head pools the last token."""
    base = save_base(tmp_path / "base", "qwen2")
    tokenizer = word_encoder.tokenizer
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    tokens.save_pretrained(base)
    before = save_adapter(tmp_path / "adapter", base, "lora")
    before.base_model.model.config.pad_token_id = 0
    adapted = load_adapter(tmp_path / "adapter")
    assert adapted.model.config.pad_token_id == 0
    batch = inputs("qwen2", MASKS["right"])
    assert_same(logits(adapted.model, *batch), logits(before, *batch))


# Heads and labels.


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["lora", "prefix", "p-tuning"])
def test_a_head_that_nobody_saved_is_refused(kind, copied):
    """transformers would make one up at random, a different one every time."""
    without = rewrite(copied(kind), lambda state: {k: v for k, v in state.items() if "cl" not in k})
    with pytest.raises(InputError, match=r"it lacks .*classifier\.weight"):
        load_adapter(without)


def test_a_pooler_that_nobody_saved_is_refused(copied):
    """A base without a pooler gets a random one in training, which PEFT freezes and forgets."""
    folder = copied("lora")
    base = AutoModel.from_pretrained(folder.parent / "base")
    base.pooler = None
    base.save_pretrained(folder.parent / "base")
    with pytest.raises(InputError, match=r"neither adapter .* has 'bert.pooler.*random"):
        load_adapter(folder, str(folder.parent / "base"))


def test_the_number_of_labels_is_that_of_the_saved_head(tmp_path):
    """Whatever head the base has of its own, for other labels."""
    save_base(tmp_path / "plain", "roberta")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", num_labels=2)
    model.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "plain", "prefix", labels=6)
    adapted = load_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert adapted.model.config.id2label == {i: f"LABEL_{i}" for i in range(6)}
    names = {str(i): name for i, name in enumerate("ABCDEF")}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"id2label": names}))
    adapted = load_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert list(adapted.model.config.id2label.values()) == list("ABCDEF")


def test_labels_of_the_base_are_kept_where_their_number_fits(tmp_path):
    base = save_base(tmp_path / "base", "bert", id2label={0: "no", 1: "yes", 2: "perhaps"})
    save_adapter(tmp_path / "adapter", base, "lora")
    labels = load_adapter(tmp_path / "adapter").model.config.id2label
    assert labels == {0: "no", 1: "yes", 2: "perhaps"}


# What cannot be exported.


def test_an_adapter_for_another_task_is_refused(copied):
    for task in ("CAUSAL_LM", "TOKEN_CLS", None):
        with pytest.raises(InputError, match=rf"trained for the task {task}, and only SEQ_CLS"):
            load_adapter(set_up(copied("lora"), task_type=task))


def test_a_prefix_that_peft_cannot_run_is_refused(tmp_path):
    """DistilBERT takes no past keys and values: PEFT saves such an adapter, and cannot use it."""
    base = save_base(tmp_path / "base", "distilbert")
    save_adapter(tmp_path / "adapter", base, "prefix")
    with pytest.raises(InputError, match=r"PEFT cannot run.*not support past key values"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("settings", [{"peft_type": "IA3"}, {"peft_type": "?"}, {"r": "many"}])
def test_a_configuration_that_makes_no_sense_is_refused(settings, copied):
    with pytest.raises(InputError, match=r"^adapter '"):
        load_adapter(set_up(copied("lora"), **settings))


def test_settings_of_a_newer_peft_are_not_left_out(copied):
    """PEFT warns and goes on without them, whatever they change."""
    load_adapter(set_up(copied("lora"), use_flux=False, flux_config=None))
    with pytest.raises(InputError, match=r"does not know, first 'use_flux'.*upgrade peft"):
        load_adapter(set_up(copied("lora"), use_flux=True))


def test_a_pickled_adapter_with_a_payload_is_not_run(copied, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    folder = copied("lora")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Payload()}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle and was not loaded"):
        load_adapter(folder)
    assert not (tmp_path / "executed").exists()


def test_code_of_the_base_needs_trust(copied):
    folder = copied("lora")
    path = folder.parent / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "a.B"}}))
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_adapter(folder, str(path.parent))


def test_a_missing_peft_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'trainkit-onnx\[peft\]'"):
        load_adapter(tmp_path)
