"""One training for its speed, in a process of its own: ``bench.training`` starts it in turns.

Both engines fine-tune the same backbone in float32 on the same batches of the same token ids, with
AdamW, clipping, dropout and a schedule. Their heads differ: trainkit's is linear over the states'
mean, transformers' is BERT's own, a pooler and a linear layer (0.7% of MiniLM's parameters).
"""

import itertools
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch.utils.data import Sampler, SequentialSampler

from trainkit.bench.measure.procfs import peak_rss_bytes
from trainkit.data.columns import Columns
from trainkit.data.splits import Splits, load
from trainkit.models import backbone
from trainkit.models.loading import quiet
from trainkit.serve.errors import InputError
from trainkit.trainer.batches import EncodedExamples, encode
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.config import DEFAULTS
from trainkit.trainer.loop import fit
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.setup import seed_everything

Trainer = Literal["trainkit", "transformers.Trainer"]
LOSS_STEPS = 5  # whose mean is compared


class TrainingJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to train: ``steps`` batches, of which the first ``warm_up`` are not timed."""

    engine: Trainer
    data: str
    backbone: str
    batch_size: int
    steps: int
    warm_up: int
    threads: int
    seed: int


class Timed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of each timed step, tokens without padding in them, and the last steps' mean loss."""

    seconds: tuple[float, ...]
    tokens: int
    padding_share: float
    last_loss: float
    peak_rss_bytes: int | None
    versions: dict[str, str]


class Clock:
    """TrainingCallback that keeps when each step ended, and the losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self._sum = 0.0

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """One step was made; ``loss`` is the mean of all steps so far, which are of one size."""
        self.ends.append(time.perf_counter())
        self.losses.append(loss * done - self._sum)
        self._sum = loss * done

    def epoch(self, result: Epoch) -> None:
        """Do nothing."""

    def refit(self) -> None:
        """Do nothing."""


def main(job: TrainingJob) -> Timed:
    """Train, and return the times."""
    torch.set_num_threads(job.threads)
    rows = load(job.data, Columns(), job.seed).train
    count = job.steps * job.batch_size
    if len(rows) < count:
        raise InputError(f"{job.data} has {len(rows)} rows to train on, and {count} are needed.")
    chosen = np.random.default_rng(job.seed).permutation(len(rows))[:count]
    train_rows = tuple(rows[i] for i in chosen)
    # What is scored is not timed, so it is small.
    splits = Splits(train_rows, train_rows[:1], train_rows[:1])
    choice = ModelSpec(kind="finetune", backbone=job.backbone)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        data = (_trainkit if job.engine == "trainkit" else _trainer)(
            job, choice, splits, Path(folder), clock
        )
    ends = clock.ends[job.warm_up - 1 :]
    order = _order(job, data)[job.warm_up * job.batch_size :]
    lengths = np.array([len(data.rows[i]) for i in order]).reshape(-1, job.batch_size)
    return Timed(
        seconds=tuple(float(later - earlier) for earlier, later in itertools.pairwise(ends)),
        tokens=int(lengths.sum()),
        padding_share=float(1 - lengths.sum() / (lengths.max(1) * job.batch_size).sum()),
        last_loss=float(np.mean(clock.losses[-LOSS_STEPS:])),
        peak_rss_bytes=peak_rss_bytes(),
        versions=_versions(),
    )


def _order(job: TrainingJob, data: EncodedExamples) -> list[int]:
    """Return the rows in the order in which trainkit's first epoch takes them."""
    order: list[int] = np.random.default_rng((job.seed, 1)).permutation(len(data.rows)).tolist()
    return order


def _trainkit(
    job: TrainingJob, choice: ModelSpec, splits: Splits, folder: Path, clock: Clock
) -> EncodedExamples:
    config = msgspec.structs.replace(
        DEFAULTS["finetune"], epochs=1, batch_size=job.batch_size, seed=job.seed, device="cpu"
    )
    seed_everything(job.seed)
    new = make_model(choice, splits)
    fit(new, splits, config, folder, clock)
    return encode(splits.train, new.encoder, new.model.config.labels)


def _trainer(
    job: TrainingJob, choice: ModelSpec, splits: Splits, folder: Path, clock: Clock
) -> EncodedExamples:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    labels = splits.label_names
    home = backbone.resolve(job.backbone)
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            home, num_labels=len(labels), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(home)
    # trainkit's encoder, for the same token ids.
    data = encode(splits.train, make_model(choice, splits).encoder, labels)
    rows = [
        {
            "input_ids": data.rows[i],
            "attention_mask": [1] * len(data.rows[i]),
            "labels": int(data.labels[i]),
        }
        for i in _order(job, data)
    ]

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.ends.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Sampler[int]:
            return SequentialSampler(rows)

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            found: Any = super().compute_loss(*arguments, **options)
            clock.losses.append(float(found))  # trainkit looks at each loss too
            return found

    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **_settings(job),
    )
    InOrder(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Times()],
    ).train()
    return data


def _settings(job: TrainingJob) -> dict[str, Any]:
    """Return what trainkit's own training is set to, in the Trainer's words.

    But for the head, which has a higher rate of its own there.
    """
    config = DEFAULTS["finetune"]
    return {
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": 1,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_gradient_norm,
        "warmup_steps": round(config.warmup_share * job.steps),
        "lr_scheduler_type": "cosine",
        "seed": job.seed,
        "use_cpu": True,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate")}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # the Trainer prints its own summary
        timed = main(msgspec.json.decode(sys.argv[1], type=TrainingJob))
    sys.stdout.buffer.write(msgspec.json.encode(timed))
