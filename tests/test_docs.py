"""Every code block in README and docs/ works: Python runs, commands run or parse, data parses."""

import csv
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import peft
import pytest
import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

import trainkit
from trainkit.cli import cli
from trainkit.data.vocabulary import word_tokenizer

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The documents whose Python runs here, as one program each.
PYTHON = [
    "README.md",
    "docs/adapters.md",
    "docs/bundle.md",
    "docs/python-api.md",
    "docs/quickstart.md",
]
# And those whose Python another test runs.
ELSEWHERE = {"docs/library.md": "tests/serve/test_library.py", "docs/interop.md": "make interop"}
# The documents whose trainkit commands really run; the commands of the others are parsed.
RUN = ["README.md", "docs/quickstart.md"]
# What is parsed even there: it serves until it is stopped, needs a server, the network or a
# trained model's accuracy.
PARSED = ("trainkit serve", "trainkit bench load", "trainkit export cross-encoder", "int8")
# Other programs than trainkit.
OTHERS = ("make", "pip", "python3 -m venv", "curl", "kubectl", "serve run")
UNPARSED = {"", "dockerfile", "javascript"}  # plain text; `make interop` runs the JavaScript

pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 asks transformers for a property that it has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def blocks(document, *languages):
    """Return the code blocks of a document in these languages, all without any."""
    found = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def command_lines(document):
    """Return the commands in a document's shell blocks, a continued line joined to its first."""
    code = "\n".join(blocks(document, "sh")).replace("\\\n", " ").replace(",\n  ", ", ")
    lines = [line for line in code.splitlines() if line and line[0] != "#"]
    plain = "\n".join(blocks(document, "")).replace("\\\n", " ")
    return lines + re.findall(r"^(?:trainkit|python -m|torchrun) .*$", plain, re.MULTILINE)


@pytest.fixture(scope="module")
def place(once, splits):
    """Return a folder with the files that the documents name, small ones."""

    def make(folder):
        folder.mkdir()
        (folder / "bundle").symlink_to(ROOT / "tests" / "golden" / "bundle")
        with (folder / "questions.csv").open("w", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows([example.text, example.label] for example in splits.train[:240])
        words = word_tokenizer([example.text for example in splits.train], 2)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, model_max_length=48, pad_token="[PAD]", unk_token="[UNK]"
        )
        tokenizer.save_pretrained(folder / "my-encoder")
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, **sizes
        )
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder / "my-encoder")
        base = AutoModelForSequenceClassification.from_pretrained(folder / "my-encoder")
        lora = peft.LoraConfig("SEQ_CLS", init_lora_weights=False, target_modules=["query"])
        peft.get_peft_model(base, lora).save_pretrained(folder / "my-adapter")

    return once("documents", make)


@pytest.fixture
def inside(place, tmp_path, monkeypatch):
    """Change to a folder like ``place`` that the test may change."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def run(line):
    """Run a trainkit command in this process; return its exit code."""
    arguments = line.replace("--backbone minilm", "--backbone my-encoder")
    arguments = arguments.replace("sample", "questions.csv").split("#")[0]  # fewer texts
    if "bench run" in line:
        arguments += " --min-seconds 0.1 --min-rounds 2"
    return cli.main(shlex.split(arguments, comments=True)[1:], standalone_mode=False)


@pytest.mark.parametrize("document", PYTHON)
def test_python_runs_and_prints_what_it_says(document, inside, capsys):
    if "import trainkit\n" in (ROOT / document).read_text("utf-8") and not hasattr(
        trainkit, "train"
    ):
        pytest.skip("the Python API is not there yet")
    if document == "docs/adapters.md":
        run("trainkit train --data questions.csv --model prefix --backbone my-encoder --head own")
    capsys.readouterr()
    program = "\n".join(blocks(document, "python")).replace('"minilm"', '"my-encoder"')
    exec(compile(program, document, "exec"), {"__name__": document})
    if document == "docs/bundle.md":  # of a trained model
        assert capsys.readouterr().out == "NUM\n"


@pytest.mark.parametrize("document", RUN)
def test_commands_run(document, inside):
    for line in command_lines(document):
        if line.startswith("trainkit") and not any(part in line for part in PARSED):
            run(line)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document):
    for line in command_lines(document):
        words = shlex.split(line, comments=True)
        if words[0] == "trainkit" or words[0] == "torchrun":
            parse(words[words.index("trainkit") + 1 :])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2])
        else:
            assert line.startswith(OTHERS), line


def parse(words):
    """Parse a command's arguments, without running it."""
    command, context = cli, click.Context(cli)
    while isinstance(command, click.Group):
        command = command.get_command(context, words.pop(0))
    command.make_context("trainkit", words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_data_parses(document):
    parsers = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
    parsers |= {"csv": lambda text: list(csv.reader(text.splitlines(), strict=True))}
    languages = {language for language, _ in BLOCK.findall((ROOT / document).read_text("utf-8"))}
    assert languages <= {*parsers, *UNPARSED, "sh", "python"}
    for language, parser in parsers.items():
        for code in blocks(document, language):
            parser(code)


def test_each_document_with_python_is_run():
    assert sorted(d for d in DOCUMENTS if blocks(d, "python")) == sorted([*PYTHON, *ELSEWHERE])
