"""The page needs nothing but itself, and every plot is drawn or said to be missing."""

import json
import re
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from tests.bench import results
from tests.helpers.html import Page, outside
from trainkit.bench.report.html import html
from trainkit.bench.report.plots import COLOURS, Missing, Plot, plots, svg
from trainkit.bench.result import Result


@pytest.fixture(scope="module")
def full() -> Result:
    return results.full(noisy=True, noisy_because=("load 9",), data="</script><b>questions & co")


@pytest.fixture(scope="module")
def page(full: Result) -> str:
    return html(full)


def test_the_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    assert outside(page) == []
    scripts = [attributes for tag, attributes in Page(page).tags if tag == "script"]
    assert [one.get("type") for one in scripts] == ["application/json"]
    assert outside('<img src="https://example.org/a.png"><style>@import "b";</style>')


def test_the_result_comes_out_of_the_page_as_it_went_in(full: Result, page: str) -> None:
    (script,) = Page(page).scripts
    assert msgspec.json.decode(script, type=Result) == full
    assert json.loads(script)["data"] == "</script><b>questions & co"
    assert "b" not in [tag for tag, _ in Page(page).tags]


def test_all_plots_tables_and_sections_are_there(full: Result, page: str) -> None:
    parsed = Page(page)
    text = " ".join(parsed.text)
    assert sum(tag == "img" for tag, _ in parsed.tags) == 4
    for name in ("Latency against length", "Throughput against batch size"):
        assert name in text
    for name in ("Latency against load", "Accuracy against speed", "Noisy: load 9."):
        assert name in text
    for work in full.workloads:
        assert work.name in text
        for measured in work.measurements:
            assert f"{measured.texts_per_s:,.0f}" in text
    assert "Not measured: onnx-cuda: this ONNX Runtime has no CUDAExecutionProvider" in text
    assert "outputs are wrong: TorchScript" in text
    assert full.environment.processor in text
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_result_gives_the_same_page(full: Result, page: str) -> None:
    assert html(full) == page
    assert "<dc:date>" not in page


def test_a_plot_without_data_is_left_out_and_said_so() -> None:
    bare = results.result(
        [results.TORCH._replace(accuracy=None), results.ONNX._replace(accuracy=None)]
    )
    assert all(isinstance(plot, Missing) for plot in plots(bare))
    parsed = Page(html(bare))
    assert "img" not in [tag for tag, _ in parsed.tags]
    text = " ".join(parsed.text)
    assert text.count("is not drawn:") == 4
    assert "it needs texts with labels" in text


def test_points_are_the_figures_and_lie_in_their_intervals(full: Result) -> None:
    length, batch, load, accuracy = plots(full)
    assert isinstance(batch, Plot)
    (panel,) = batch.panels
    offline = [work for work in full.workloads if work.scenario == "offline"]
    for series in panel.series:
        assert [(point.x, point.y) for point in series.points] == [
            (work.batch_size, work.measurements[series.engine].texts_per_s) for work in offline
        ]
    assert isinstance(load, Plot)
    server = [work for work in full.workloads if work.scenario == "server"]
    for panel, name in zip(load.panels, ("p50_ms", "p99_ms"), strict=True):
        for series in panel.series:
            assert [(point.x, point.y) for point in series.points] == [
                (work.rate, getattr(work.measurements[series.engine], name)) for work in server
            ]
    assert isinstance(accuracy, Plot)
    spots = {one.engine: one.points[0] for one in accuracy.panels[0].series}
    assert spots[2].y == pytest.approx(94.4)
    assert spots[2].x == max(work.measurements[2].texts_per_s for work in offline)
    assert isinstance(length, Plot)
    assert [panel.title for panel in length.panels] == ["batches of 1", "batches of 16"]
    for panel in (*length.panels, *batch.panels, *load.panels):
        for series in panel.series:
            for point in series.points:
                assert point.low <= point.y <= point.high
                assert point.low < point.high


def test_the_time_of_a_grids_batch_is_the_true_one(full: Result) -> None:
    length = plots(full)[0]
    assert isinstance(length, Plot)
    for panel, size in zip(length.panels, (1, 16), strict=True):
        for series in panel.series:
            truth = results.ALL[series.engine]
            for point in series.points:
                true_ms = truth.call_ms + truth.token_us * size * point.x / 1e3
                assert point.y == pytest.approx(true_ms, rel=0.05)


def test_a_wrong_engine_is_in_no_plot(full: Result) -> None:
    for plot in plots(full):
        assert isinstance(plot, Plot)
        for panel in plot.panels:
            assert {series.engine for series in panel.series} == {0, 1, 2}


def test_an_engine_has_one_colour_in_all_plots(full: Result) -> None:
    for plot in plots(full):
        assert isinstance(plot, Plot)
        drawing = svg(plot, full).decode()
        ElementTree.fromstring(drawing)
        seen = set(re.findall(r"(?:stroke|fill): (#\w+)", drawing))
        assert {colour.lower() for colour in COLOURS[:3]} <= seen
        assert not {colour.lower() for colour in COLOURS[3:]} & seen
        for truth in results.ALL[:3]:
            assert f">{truth.name}</text>" in drawing
        assert f">{plot.x_label}</text>" in drawing
        assert f">{plot.y_label}</text>" in drawing


def test_many_engines_keep_colour_and_marker_apart() -> None:
    from trainkit.bench.report.plots import _style

    many = [results.ONNX._replace(source=f"runs/{number}") for number in range(20)]
    made = results.result(many, rounds=1)
    styles = {_style(made, number)[:2] for number in range(20)}
    assert len(styles) == 20
    threads = [results.ONNX._replace(threads=number) for number in (1, 2)]
    one, two = (_style(results.result(threads, rounds=1), number) for number in (0, 1))
    assert one[:2] == two[:2]
    assert one[2] != two[2]


def test_samples_without_a_percentile_have_no_point() -> None:
    works = [results.Work("server", 1, batches=20, rate=rate) for rate in (10, 20)]
    made = results.result([results.ONNX], works, rounds=5)  # 200 requests: no p99
    load = plots(made)[2]
    assert isinstance(load, Plot)
    assert [panel.title for panel in load.panels] == ["p50"]
    assert np.isfinite(load.panels[0].series[0].points[0].y)
