"""A run's report needs nothing but itself, escapes what it quotes, and gives the run's figures."""

import json
import sys

import numpy as np
import pytest

from tests.helpers.html import Page, outside
from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.trainer import report
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import evaluate
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

HOSTILE = '</td><script>alert("$x$")</script><img src="https://example.org/a.png">& Ω'


def sections(labels, texts=40, hostile="Who?"):
    """Return a report's content: random logits, and some labels that they contradict."""
    names = tuple(f"{hostile} {i:02d}" for i in range(labels))
    random = np.random.default_rng(labels)

    def scored(name, count):
        examples = tuple(
            Example(f"{hostile} {name} text {i}", names[i % labels]) for i in range(count)
        )
        logits = random.normal(size=(count, labels)).astype(np.float32)
        logits[np.arange(count), np.arange(count) % labels] += 2
        logits[0] = 0
        logits[0, 1] = 9  # its label is 0
        return report.ScoredExamples(name, examples, logits)

    train, valid, test = (scored(name, texts) for name in ("training", "validation", "test"))
    history = [Epoch(i, 2 / i, 0.3 * i, 2.5 / i, 0.25 * i, best=i < 3) for i in (1, 2, 3)]
    return report.Sections(
        title=f"Run {hostile}",
        spec=ModelSpec(kind="simple"),
        config=TrainConfig(learning_rate=0.125),
        splits=Splits(train.examples, valid.examples, test.examples),
        labels=names,
        history=history,
        best=history[1],
        train=train,
        valid=valid,
        test=test,
        scores=tuple(
            evaluate(part.logits, [example.label for example in part.examples], names, 1.5)
            for part in (valid, test)
        ),
        no_temperature="",
    )


@pytest.mark.parametrize("labels", [6, 77])
def test_a_hostile_text_or_label_stays_text(labels):
    page = report.html(sections(labels, 160, HOSTILE))
    parsed = Page(page)
    assert outside(page) == []
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe"}
    assert parsed.open == []  # every tag is closed
    assert f"{HOSTILE} validation text 0" in parsed.text
    assert f"Run {HOSTILE}" in parsed.text
    assert sum(tag == "img" for tag, _ in parsed.tags) == 2
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_an_unescaped_text_is_noticed(monkeypatch):
    """The test above is able to fail."""
    monkeypatch.setattr("jinja2.runtime.escape", str)
    page = report.html(sections(6, 20, HOSTILE))
    assert outside(page) != []
    assert "script" in {tag for tag, _ in Page(page).tags}


def test_few_labels_have_a_matrix_and_many_their_largest_confusions():
    few, many = sections(6), sections(77, 300)
    text = Page(report.html(few)).text
    test = few.scores[1]
    cells = "".join(text)
    matrix = cells[cells.index("Rows are the true") : cells.index("Reliability on the test")]
    for name, row in zip(few.labels, test.confusion, strict=True):
        assert name + "".join(str(count) if count else "·" for count in row) in matrix
    said = " ".join(Page(report.html(many)).text)
    wrong = sum(
        count
        for i, row in enumerate(many.scores[1].confusion)
        for j, count in enumerate(row)
        if i != j
    )
    assert "77 labels" in said
    assert f"{wrong} of 300 texts were given another label" in said
    assert "Rows are the true" not in said


def test_what_contradicts_its_label_is_hardest_and_likely_mislabelled():
    run = sections(6)
    said = Page(report.html(run)).text
    for heading in ("The hardest validation examples", "Likely mislabelled"):
        after = said[said.index(heading) :]
        assert next(part for part in after if " text " in part) == "Who? validation text 0"


def test_likely_mislabelled_is_the_confident_joints_off_diagonal():
    random = np.random.default_rng(0)
    scores = random.dirichlet(np.ones(5), size=300)
    true = random.integers(0, 4, size=300)  # no row has label 4
    found = report.likely_mislabelled(scores, true)
    least = [np.mean([p[j] for p, t in zip(scores, true, strict=True) if t == j]) for j in range(4)]
    expected = {
        i
        for i, (p, t) in enumerate(zip(scores, true, strict=True))
        if (j := int(p.argmax())) != t and j < 4 and p[j] >= least[j]
    }
    assert set(found) == expected
    assert 0 < len(expected) < 300
    margins = [scores[i].max() - scores[i, true[i]] for i in found]
    assert margins == sorted(margins, reverse=True)


def test_without_a_temperature_the_reason_is_given():
    run = sections(6)._replace(no_temperature="the logits are right about every label")
    said = " ".join(Page(report.html(run)).text)
    assert "No temperature was kept: the logits are right about every label" in said
    assert "with temperature" not in said


@pytest.fixture(scope="module")
def reported(splits, tmp_path_factory):
    few = Splits(splits.train[:120], splits.valid[:60], splits.test[:40])
    folder = tmp_path_factory.mktemp("reported") / "run"
    config = TrainConfig(epochs=3, learning_rate=3e-3)
    return train(ModelSpec(kind="simple", max_length=32), few, config, folder, report=True)


def test_its_figures_are_those_of_the_runs_files(reported):
    page = (reported.folder / report.REPORT).read_text(encoding="utf-8")
    assert outside(page) == []
    said = Page(page).text
    for name in ("valid", "test"):
        scores = json.loads((reported.folder / f"{name}.json").read_text())
        row = said[said.index("validation" if name == "valid" else "test") :][:7]
        assert row[1:] == [
            str(scores["count"]),
            f"{100 * scores['accuracy']:.1f}%",
            f"{100 * scores['macro_f1']:.1f}%",
            f"{scores['loss']:.3f}",
            f"{100 * scores['calibration_error']:.1f}%",
            f"{100 * scores['raw_calibration_error']:.1f}%",
        ]
    kept = json.loads((reported.folder / "checkpoint.json").read_text())
    told = " ".join(said)
    assert f"The temperature is {kept['temperature']:.3f}" in told
    assert f"best epoch {kept['epoch']} of 3" in told
    assert said[said.index("learning rate") + 1] == "0.003"
    assert said[said.index("torch") + 1] == kept["versions"]["torch"]
    counts = said[said.index("all") :][1:4]
    assert counts == ["120", "60", "40"]


def test_without_matplotlib_nothing_is_trained(splits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trainkit.trainer.report", None)
    with pytest.raises(ModuleNotFoundError):
        train(ModelSpec(kind="simple"), splits, TrainConfig(), tmp_path / "run", report=True)
    assert list(tmp_path.iterdir()) == []
