"""Make the golden bundle again: ``python tests/golden/make.py`` (only when its format changes).

A model of a few thousand weights, trained on the project's own questions. It stands for every
bundle that a user has stored: later versions must go on reading it.
"""

import sys
from pathlib import Path

from trainkit.data.columns import Columns
from trainkit.data.splits import load
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.export.bundle_writer import prepare, write_bundle
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.models.classifier import UntrainedModel, build
from trainkit.models.config import ModelConfig, TransformerConfig
from trainkit.serve.encoding import TextEncoder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.loop import fit
from trainkit.trainer.setup import seed_everything


def main(folder: Path, scratch: Path) -> None:
    splits = load("sample", Columns())
    tokenizer = word_tokenizer([example.text for example in splits.train], min_count=4)
    encoder = TextEncoder(tokenizer, 24, PAD_ID)
    sizes = TransformerConfig(
        vocabulary_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        layers=1,
        heads=2,
        feed_forward_size=32,
    )
    settings = ModelConfig(
        kind="simple", labels=splits.label_names, max_length=24, pad_id=PAD_ID, transformer=sizes
    )
    seed_everything(0)
    new = UntrainedModel(build(settings), encoder)
    scratch.mkdir(parents=True)
    fit(new, splits, TrainConfig(epochs=30, learning_rate=5e-3), scratch)
    write_bundle(
        prepare(open_source(str(scratch)), splits.test), folder, ExportSettings(), force=True
    )


if __name__ == "__main__":
    main(Path(__file__).parent / "bundle", Path(sys.argv[1]))
