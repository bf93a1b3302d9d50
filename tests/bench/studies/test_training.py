"""The benchmark of trainings: what its figures are, and that it runs both engines on the same."""

import dataclasses

import msgspec
import pytest
from click.testing import CliRunner

from trainkit.bench.studies.study import head
from trainkit.bench.studies.training import (
    STUDY,
    TrainedCorpus,
    Training,
    check,
    markdown,
    rates,
    ratios,
)
from trainkit.bench.studies.training_run import Timed
from trainkit.serve.errors import CheckFailedError


def timed(*seconds):
    return Timed(
        seconds=seconds,
        tokens=1000,
        padding_share=0.25,
        last_loss=1.5,
        peak_rss_bytes=10**9,
        versions={"torch": "2"},
    )


def corpus(mine, other, goal=1.5):
    runs = {"trainkit": tuple(mine), "transformers.Trainer": tuple(other)}
    return TrainedCorpus(name="TREC", batch_size=32, goal=goal, runs=runs)


def document(*corpora):
    return Training(
        **head(),
        noisy=True,
        noisy_because=("others",),
        backbone="minilm",
        threads=2,
        corpora=corpora,
    )


def test_the_ratio_is_that_of_the_median_steps_of_a_round():
    # The outlier of a step does not move its round.
    found = corpus([timed(0.1, 0.1, 9.0), timed(0.2, 0.2)], [timed(0.2, 0.2), timed(0.3, 0.3)])
    assert rates(found, "trainkit") == pytest.approx([320, 160])
    assert ratios(found) == pytest.approx([2.0, 1.5])
    table = markdown(document(found))
    assert "| 1.75 (1.50 to 2.00) |" in table
    assert "| TREC | 25% | 240.0 | 133.3 |" in table
    assert "Noisy: others." in table


def test_a_goal_that_is_missed_is_an_error():
    slow = corpus([timed(0.1)], [timed(0.14)])
    with pytest.raises(CheckFailedError, match=r"on TREC 1\.40 times, not 1\.5"):
        check(document(slow))
    check(document(msgspec.structs.replace(slow, goal=1.3)))


@pytest.mark.slow
def test_both_engines_train_on_the_same_tokens(tmp_path):
    study = dataclasses.replace(STUDY, check=lambda found: None)
    out = tmp_path / "training.json"
    arguments = ["--trec", "sample", "--newsgroups", "sample", "--rounds", "1"]
    arguments += [
        "--newsgroups-rounds",
        "1",
        "--batch-size",
        "4",
        "--trec-steps",
        "8",
        "--newsgroups-steps",
        "4",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(study.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    found = STUDY.load(out)
    for one, steps in zip(found.corpora, (8 - 5, 4 - 2), strict=True):
        (mine,), (other,) = one.runs.values()
        assert mine.tokens == other.tokens
        assert mine.padding_share == other.padding_share
        assert len(mine.seconds) == len(other.seconds) == steps
        assert all(1 < run.last_loss < 3 for run in (mine, other))  # of six classes: log 6 is 1.8
