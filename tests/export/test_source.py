"""What can be exported: Hugging Face folders and PEFT adapters, against their own libraries."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from tests.families import random_classifier
from trainkit.cli import cli
from trainkit.export import bundle_writer
from trainkit.export.settings import ExportSettings
from trainkit.export.source import ExportSource, open_source
from trainkit.models.classifier import on_backbone
from trainkit.models.hub_classifier import Forward
from trainkit.serve import Classifier
from trainkit.serve.errors import CheckFailedError, InputError

TEXTS = ["How far is Mars?", "Who wrote the Odyssey?", "What does DNA stand for?", "Why?"]
PAIRS = [("How far is Mars?", "It is far."), ("Who wrote it?", "Homer wrote the Odyssey.")]
LABELS = {0: "LOC", 1: "HUM", 2: "NUM"}

# PEFT 0.21 asks transformers for a property that it has renamed.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module")
def tokenizer(splits):
    """Return a tokenizer that frames pairs as BERT does, trained on the questions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [example.text for example in splits.train]
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def hub_folder(tokenizer, tmp_path_factory):
    """Return a folder as ``save_pretrained`` leaves it: a BERT classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "my-classifier"
    model = random_classifier("bert", len(tokenizer), id2label=LABELS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_copy(hub_folder, tmp_path):
    import shutil

    return shutil.copytree(hub_folder, tmp_path / "copy")


def test_a_hugging_face_folder_answers_as_transformers_own_pipeline(hub_folder, tmp_path):
    source = open_source(str(hub_folder))
    bundle_writer.write_bundle(bundle_writer.prepare(source), tmp_path / "bundle", ExportSettings())
    classify = Classifier.load(tmp_path / "bundle")
    own = pipeline("text-classification", model=str(hub_folder), top_k=None)
    for text in [*TEXTS, *PAIRS]:
        asked = text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
        answers = own([asked])[0]
        expected = {answer["label"]: answer["score"] for answer in answers}
        found = classify([text])[0].scores
        assert found == pytest.approx(expected, abs=1e-5)
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in LABELS.items()}
    assert str(hub_folder.parent) not in (tmp_path / "bundle" / "trainkit.json").read_text()


def test_the_two_texts_of_a_pair_are_told_apart(hub_folder):
    source = open_source(str(hub_folder))
    batch = source.encoder.encode(PAIRS)
    assert batch.token_type_ids.max() == 1
    flat = batch._replace(token_type_ids=np.zeros_like(batch.input_ids))
    assert not np.allclose(source.reference(batch), source.reference(flat), atol=1e-3)


def test_a_checkpoint_without_a_head_is_refused(hub_copy):
    weights = load_file(hub_copy / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, hub_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the weights .* 'classifier.weight'"):
        open_source(str(hub_copy))


def test_a_tokenizer_of_special_tokens_alone_is_refused(hub_copy):
    (hub_copy / "tokenizer.json").unlink()
    (hub_copy / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        open_source(str(hub_copy))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "code.Config"}}, "--trust-remote-code"),
        ("tokenizer.pkl", b"cos\nsystem\n(S'true'\ntR.", "pickle"),
    ],
)
def test_nothing_that_a_stranger_sends_is_executed(name, content, said, hub_copy):
    path = hub_copy / name
    if isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        (hub_copy / "tokenizer.json").unlink()
        path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_source(str(hub_copy))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({1: "class 0", 2: "class 1", 9: "last"}, "so name 0 to 2, each once"),
        ({0: "good", 1: "good", 2: "good"}, "several indexes the name 'good'"),
    ],
)
def test_labels_have_one_name_each(names, said, hub_copy):
    edit_config(hub_copy, id2label=names)
    with pytest.raises(InputError, match=said):
        open_source(str(hub_copy))


def opened(kind, folder, adapter_folder):
    """Open a folder as a classifier, as the base of an adapter, or as a backbone to train."""
    if kind == "backbone":
        return on_backbone("finetune", ["a", "b"], str(folder))
    return open_source(str(adapter_folder if kind == "adapter" else folder))


@pytest.fixture(params=["classifier", "adapter", "backbone"])
def edited(request, hub_copy, tmp_path):
    """Return a folder to edit, and a function that opens it in one of three ways."""
    adapter(hub_copy, tmp_path / "adapter", copy.deepcopy(ADAPTERS["lora"]))
    return hub_copy, lambda: opened(request.param, hub_copy, tmp_path / "adapter")


def test_tokens_without_an_embedding_are_refused(edited):
    folder, open_it = edited
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    first = len(tokenizer)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=f"2 tokens .*first '<new1>' with id {first}"):
        open_it()


def test_switches_of_the_outputs_form_change_nothing(edited):
    folder, open_it = edited
    plain = open_it()
    edit_config(folder, return_dict=False, output_hidden_states=True, torchscript=True)
    switched = open_it()
    if isinstance(plain, ExportSource):
        batch = plain.encoder.encode(["How far is Mars?", "Why?"])
        np.testing.assert_array_equal(switched.reference(batch), plain.reference(batch))
        assert switched.architecture == plain.architecture
    else:
        assert switched.model.config == plain.model.config


def test_a_longer_limit_than_the_positions_is_cut(hub_folder):
    assert open_source(str(hub_folder), max_length=9).encoder.max_length == 9
    assert open_source(str(hub_folder), max_length=4000).encoder.max_length == 48


def test_other_folders_are_named(tiny_bundles, hub_folder, tmp_path):
    with pytest.raises(InputError, match="is a bundle, exported already"):
        open_source(str(tiny_bundles["onnx"]))
    with pytest.raises(InputError, match="nor a run"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match="--base goes with a PEFT adapter"):
        open_source(str(hub_folder), base="other")


def adapter(hub_folder, folder, config):
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(hub_folder)
    adapted = peft.get_peft_model(base, config)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "classifier" not in name:
            torch.nn.init.normal_(weight, std=0.3)  # LoRA begins as no change at all
    adapted.save_pretrained(folder)
    return adapted.eval()


ADAPTERS = {
    "lora": peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]),
    "prefix": peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_computes_what_peft_computes(kind, hub_folder, tmp_path):
    own = adapter(hub_folder, tmp_path / "adapter", ADAPTERS[kind])
    source = open_source(str(tmp_path / "adapter"), base=str(hub_folder))
    assert source.facts["adapter"]["largest_logit_change"] > 0.01
    exported = bundle_writer.write_bundle(
        bundle_writer.prepare(source), tmp_path / "bundle", ExportSettings()
    )
    batch = source.encoder.encode(TEXTS)
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(array) for name, array in batch.tensors().items()}
        expected = Forward(own)(**tensors).numpy()
    found = Classifier.load(tmp_path / "bundle").run(batch)
    assert np.allclose(found, expected, atol=2e-5)
    assert exported.manifest.source["adapter"] == source.facts["adapter"]
    assert exported.manifest.labels == tuple(LABELS.values())


def test_an_adapter_that_changes_nothing_is_refused(hub_folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(hub_folder)
    untrained = peft.get_peft_model(base, ADAPTERS["lora"])
    untrained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckFailedError, match="changes nothing"):
        open_source(str(tmp_path / "adapter"), base=str(hub_folder))


def test_an_adapter_whose_base_is_nowhere_names_the_option(hub_folder, tmp_path):
    adapter(hub_folder, tmp_path / "adapter", ADAPTERS["lora"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(InputError, match="--base"):
        open_source(str(tmp_path / "adapter"))


@pytest.fixture
def questions(tmp_path):
    """Return a file of questions with the labels of the tiny classifier."""
    path = tmp_path / "questions.csv"
    rows = [f'"{text}",{LABELS[number % 3]}' for number, text in enumerate(TEXTS)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def answer(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["prefix", "p-tuning", "lora", "prompt"])
def test_the_commands_take_an_adapter(kind, hub_folder, questions, tmp_path):
    """ExportResult, verified against PEFT again, and scored: the same before and after."""
    own = adapter(hub_folder, tmp_path / "adapter", ADAPTERS[kind])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    moved = ["--base", hub_folder]
    bundle = tmp_path / "bundle"
    answer("export", tmp_path / "adapter", *moved, "--out", bundle, "--no-optimize", "--json")
    report = answer("verify", bundle, "--against", tmp_path / "adapter", *moved, "--json")
    assert report["failed"] == 0 < report["rows"]
    before = answer("evaluate", tmp_path / "adapter", *moved, "--data", questions, "--json")
    after = answer("evaluate", bundle, "--data", questions, "--json")
    assert before["confusion"] == after["confusion"]
    encoder = open_source(str(tmp_path / "adapter"), base=str(hub_folder)).encoder
    with torch.inference_mode():
        tensors = encoder.encode(TEXTS).tensors()
        chosen = Forward(own)(**{n: torch.from_numpy(a) for n, a in tensors.items()}).argmax(1)
    right = sum(int(label) == number % 3 for number, label in enumerate(chosen))
    assert before["accuracy"] == pytest.approx(right / len(TEXTS))


def test_a_base_without_an_adapter_is_refused(hub_folder, tiny_bundles, questions):
    bundle = str(tiny_bundles["onnx"])
    for arguments, told in (
        (["evaluate", bundle, "--data", str(questions)], "--base goes with a PEFT adapter"),
        (["verify", bundle], "--base goes with --against ADAPTER"),
    ):
        done = CliRunner().invoke(cli, [*arguments, "--base", str(hub_folder)])
        assert done.exit_code == 2
        assert told in done.output


@pytest.mark.parametrize("option", [["--base", "somewhere"], ["--max-length", "8"]])
def test_a_run_has_its_own_base_and_length(option, tiny_run, tmp_path):
    arguments = ["export", str(tiny_run), "--out", str(tmp_path / "bundle"), *option]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert f"is a run, which has its own {option[0]}" in done.output


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_what_has_not_one_label_a_text_is_not_scored(problem, hub_copy, questions):
    path = hub_copy / "config.json"
    config = json.loads(path.read_text()) | {"problem_type": problem}
    if problem == "regression":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        weights = load_file(hub_copy / "model.safetensors")
        head = {n: w[:1].contiguous() for n, w in weights.items() if n.startswith("classifier.")}
        save_file(weights | head, hub_copy / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config))
    done = CliRunner().invoke(cli, ["evaluate", str(hub_copy), "--data", str(questions)])
    assert done.exit_code == 2
    assert f"does {problem}, and evaluate scores one label per text" in done.output
