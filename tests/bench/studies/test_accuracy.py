"""The table of accuracies: trained once, kept, and held against its goals."""

import msgspec
import pytest
from click.testing import CliRunner

from trainkit.bench.studies import accuracy
from trainkit.bench.studies.accuracy import STUDY, AccuracyTask, check, markdown, mean
from trainkit.data.columns import Columns
from trainkit.serve.errors import CheckFailedError
from trainkit.trainer import checkpoint

QUICK = {"model": "simple", "epochs": 1, "max_length": 16}


@pytest.fixture
def made(monkeypatch, tmp_path, splits):
    """Run the program on the project's own questions; returns its document and how to repeat it."""
    data = tmp_path / "data" / "questions"
    data.mkdir(parents=True)
    for name in ("train", "valid", "test"):
        rows = [{"text": e.text, "label": e.label} for e in getattr(splits, name)[:120]]
        (data / f"{name}.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    tasks = (AccuracyTask("questions", "questions", Columns(), ((QUICK, 1.0),)),)
    monkeypatch.setattr(accuracy, "TASKS", tasks)
    arguments = [
        "--seeds",
        2,
        "--data",
        data.parent,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "a.json",
    ]

    def run(*more):
        done = CliRunner().invoke(
            STUDY.command, list(map(str, [*arguments, *more])), catch_exceptions=False
        )
        assert done.exit_code == 0
        return STUDY.load(tmp_path / "a.json")

    return run, tmp_path / "work"


def test_what_is_finished_is_not_trained_again(made):
    run, work = made
    found = run()
    weights = {path: path.stat().st_mtime_ns for path in work.rglob("weights-*")}
    assert len(weights) == 2
    again = run()
    assert again == msgspec.structs.replace(found, environment=again.environment, date=again.date)
    assert weights == {path: path.stat().st_mtime_ns for path in work.rglob("weights-*")}
    (work / "questions-simple-1" / "test.json").unlink()
    (partly,) = run("--finished-only").models
    (model,) = found.models
    assert partly.runs == model.runs[:1]
    assert [one.seed for one in model.runs] == [0, 1]
    assert mean(model) == pytest.approx(50 * sum(one.test_accuracy for one in model.runs))
    stated = checkpoint.load(work / "questions-simple-1").checkpoint
    assert model.runs[1].best_epoch == stated.epoch


def test_the_table_has_the_svm_and_the_goals(made):
    found = made[0]()
    table = markdown(found)
    (baseline,) = found.baselines
    assert (
        f"| questions | tf-idf, linear SVM |  |  | {100 * baseline.test_accuracy:.1f}% |" in table
    )
    assert baseline.test_accuracy > 0.5
    assert "`simple`" in table
    check(found)
    model = msgspec.structs.replace(found.models[0], goal=100.0)
    with pytest.raises(CheckFailedError, match=r"questions simple .* not 100%"):
        check(msgspec.structs.replace(found, models=(model,)))
