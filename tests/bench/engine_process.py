"""Engines in processes of their own, as a benchmark runs them, and what they compute."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from trainkit.export.parity import TOLERANCES

# It runs in the peers' environments too.
PROGRAM = """
import sys
from pathlib import Path
import msgspec, numpy as np
from trainkit.bench.engines.registry import open_engine
from trainkit.serve.encoding import Batch
work, engines = (msgspec.json.decode(Path(path).read_bytes()) for path in sys.argv[1:])
batches, texts = work
for name, source, out in engines:
    engine = open_engine(name, Path(source), 1)
    if engine.run is not None:
        logits = [engine.run(Batch(*(np.array(rows) for rows in batch))) for batch in batches]
    else:
        logits = [engine.classify(some) for some in texts]
    np.save(out, np.concatenate(logits))
    about = {"precision": engine.precision, "versions": dict(engine.versions)}
    print("ABOUT", msgspec.json.encode(about).decode())
"""


def compute(engines, batches, texts, folder, python=sys.executable):
    """Run ``engines``, pairs of a name and a source, one after the other in one process.

    Returns for each the logits of all batches, and its precision and versions.
    """
    rows = [[array.tolist() for array in batch.tensors().values()] for batch in batches]
    (folder / "work.json").write_bytes(msgspec.json.encode([rows, texts]))
    outs = [folder / f"{number}.npy" for number in range(len(engines))]
    listed = [
        (name, str(source), str(out)) for (name, source), out in zip(engines, outs, strict=True)
    ]
    (folder / "engines.json").write_bytes(msgspec.json.encode(listed))
    command = [python, "-P", "-c", PROGRAM, folder / "work.json", folder / "engines.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (line for line in done.stdout.splitlines() if line.startswith("ABOUT "))
    about = [msgspec.json.decode(line.removeprefix("ABOUT ")) for line in lines]
    return list(zip(map(np.load, outs), about, strict=True))


def agree(found, expected, precision="fp32"):
    """Judge as the benchmark does: each logit in float32, all of them together in int8."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    tolerance = TOLERANCES[precision]
    difference = np.abs(found - expected)
    if tolerance.noise is not None:
        return bool(np.sqrt((difference**2).mean()) <= tolerance.noise * expected.std())
    scale = np.abs(expected).max(axis=1, keepdims=True)
    return bool((difference <= tolerance.absolute + tolerance.relative * scale).all())


def save_classifier(folder: Path, texts):
    """Save a small random BERT and a tokenizer of the texts' words, as Hugging Face would."""
    from transformers import PreTrainedTokenizerFast

    from tests.families import MAX_LENGTH, random_classifier
    from trainkit.data.vocabulary import PAD_ID, word_tokenizer

    words = word_tokenizer(texts, min_count=1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=MAX_LENGTH,
        pad_token=words.id_to_token(PAD_ID),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    random_classifier("bert", words.get_vocab_size()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 4 does not know the name that 5 writes.
    settings = folder / "tokenizer_config.json"
    stored = msgspec.json.decode(settings.read_bytes())
    settings.write_bytes(
        msgspec.json.encode(stored | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder
