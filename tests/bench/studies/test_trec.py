"""The table of what exports give, and that they were held to every label of the test texts."""

import shutil

import msgspec
import pytest

from trainkit.bench.studies import accuracy
from trainkit.bench.studies.accuracy import AccuracyJob
from trainkit.bench.studies.cold_start import ColdStart, HelpTime
from trainkit.bench.studies.study import head
from trainkit.bench.studies.trec import ModelFigures, TrecFigures, measure_model, parity_markdown
from trainkit.trainer import checkpoint


@pytest.fixture(scope="module")
def measured(run_folder, splits, tmp_path_factory):
    """The figures of the session's run, exported from a copy that is this module's own."""
    folder = tmp_path_factory.mktemp("figures") / "run"
    shutil.copytree(run_folder, folder)
    settings = {"model": checkpoint.load(folder).checkpoint.model.kind}
    return measure_model(AccuracyJob(accuracy.TASKS[0], settings, 0, folder), splits), folder


def test_an_export_is_held_to_every_test_text(measured, splits):
    figures, folder = measured
    assert [export.format for export in figures.exports] == ["onnx", "torchscript"]
    for export in figures.exports:
        assert export.same_test_labels == len(splits.test)
        assert 0 <= export.largest_difference <= 2e-5
    (weights,) = folder.glob("weights-*")
    kept = checkpoint.load(folder).checkpoint
    assert kept.weights == weights.name
    assert figures.weights_sha256 == kept.weights_facts.sha256


def test_the_table_says_it_of_each_model(measured, splits):
    exports = tuple(
        msgspec.structs.replace(export, largest_difference=number)
        for export, number in zip(measured[0].exports, (3e-6, 0.0), strict=True)
    )
    models = (
        msgspec.structs.replace(measured[0], exports=exports),
        ModelFigures(kind="prefix", backbone="minilm", weights_sha256="0", exports=exports),
    )
    count = len(splits.test)
    cold = ColdStart(median_s=1.0, peak_rss_bytes=1, heavy_modules=(), runs=())
    figures = TrecFigures(
        **head(),
        test_questions=count,
        models=models,
        start_to_first_answer=cold,
        help=HelpTime(1.0, (1.0,)),
    )
    rows = parity_markdown(figures).splitlines()[2:]
    right = f"{100 * exports[0].accuracy:.1f}%"
    told = f"{right} | {count} of {count}, 3e-06 | {count} of {count}, 0 |"
    assert rows == [f"| `{models[0].kind}` | {told}", f"| `prefix` on minilm | {told}"]
