"""Time against real tokens: engines of a known law pass or fail, and a real bundle is measured."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from tests.bench import results
from trainkit.bench.report.plots import svg
from trainkit.bench.studies import padding_scaling
from trainkit.bench.studies.padding_scaling import (
    STUDY,
    PaddingScaling,
    check,
    markdown,
    plot,
    slope_ratio,
    write_plot,
)
from trainkit.bench.studies.padding_shapes import SHARES, Shape, shapes, workload
from trainkit.bench.studies.study import head
from trainkit.serve.errors import CheckFailedError, InputError

PACKED = results.ONNX
PADDED = results.TORCH._replace(name="ORT optimizer", runtime="ort-optimizer")


def measured(*laws, truths=(PACKED, PADDED), rounds=8) -> PaddingScaling:
    """Return what engines would have given whose milliseconds are a function of a shape."""
    random = np.random.default_rng(0)
    by_tokens, by_rows = shapes(512)
    made = results.result(truths)
    batch_ms = []
    for law in laws:
        batches = [
            part
            for one in (*by_tokens, *by_rows)
            for part in (one, Shape(1, one.longest, 0), Shape(one.rows - 1, one.rest, one.rest))
        ]
        times = np.array([law(part) for part in batches]) / 1000
        noisy = times * np.exp(random.normal(0, 0.02, size=(rounds, len(times))))
        batch_ms.append(tuple(tuple(one) for one in (1000 * noisy).tolist()))
    return PaddingScaling(
        **head(), by_tokens=by_tokens, by_rows=by_rows, result=made, batch_ms=tuple(batch_ms)
    )


def by_tokens(shape: Shape) -> float:
    return 1 + 0.2 * shape.tokens


def by_positions(shape: Shape) -> float:
    return 1 + 0.2 * shape.positions


def test_an_engine_that_skips_padding_passes_and_the_contrast_need_not():
    made = measured(by_tokens, by_positions)
    check(made)
    packed, padded = (slope_ratio(made, one) for one in made.result.workloads[0].measurements)
    assert packed.low <= packed.median <= packed.high
    assert 0.97 < packed.median < 1.03
    assert padded.median > 3


@pytest.mark.parametrize(
    "law",
    [by_positions, lambda one: by_tokens(one) + 0.01 * one.positions, lambda one: 100.0 / one.rows],
)
def test_an_engine_that_pays_for_padding_fails(law):
    made = measured(law, by_positions)
    with pytest.raises(CheckFailedError, match=r"ONNX Runtime has .*\.$"):
        check(made)


def test_the_table_and_the_plot_have_every_engine_on_every_curve():
    made = measured(by_tokens, by_positions)
    lines = markdown(made).splitlines()
    assert [line.split(" |")[0] for line in lines].count("| ONNX Runtime") == 4
    assert re.match(r"\| ONNX Runtime \| (199|200|201) \| (199|200|201) \| (0\.99|1\.0)", lines[2])
    assert re.match(r"\| ORT optimizer \| \d{3} \| \d{3} \| [3-9]\.", lines[3])
    (heading,) = [line for line in lines if "by positions of" in line]
    assert heading.startswith("| ms per batch, by positions of 1,024 tokens | 1,024 | 2,048 |")
    drawn = plot(made)
    assert [len(panel.series) for panel in drawn.panels] == [2, 2, 2]
    assert [len(series.points) for panel in drawn.panels for series in panel.series] == [
        *[4, 4],
        *[5, 5],
        *[4, 4],
    ]
    flat, rising = drawn.panels[2].series
    assert flat.points[-1].y < 1.1 * flat.points[0].y
    assert rising.points[-1].y > 6 * rising.points[0].y
    assert b"<svg" in svg(drawn, made.result)


def test_shapes_have_the_padding_that_they_are_for():
    by_count, by_rows = shapes(1000)
    assert max(one.longest for one in (*by_count, *by_rows)) == 512
    for place, one in enumerate(by_count):
        assert one.padding_share == pytest.approx(SHARES[place % len(SHARES)], abs=0.02)
        assert one.tokens == pytest.approx(256 * 2 ** (place // len(SHARES)), rel=0.06)
    for one in by_rows:
        assert one.padding_share == pytest.approx(0.5, abs=0.02)
        assert one.longest == 32
    with pytest.raises(InputError, match="64 tokens"):
        shapes(64)


def test_batches_are_the_shape_and_its_rows_apart(word_encoder):
    work = workload([Shape(4, 10, 3), Shape(2, 5, 5)], word_encoder)
    assert [batch.input_ids.shape for batch in work.work.batches] == [
        *[(4, 10), (1, 10), (3, 3)],
        *[(2, 5), (1, 5), (1, 5)],
    ]
    padded, longest, rest = work.work.batches[:3]
    assert padded.attention_mask.sum() == Shape(4, 10, 3).tokens == 19
    assert longest.attention_mask.all()
    assert rest.attention_mask.all()


def test_a_real_bundle_is_measured_and_told(tiny_bundles, tmp_path):
    out = tmp_path / "growth.json"
    folder = str(tiny_bundles["onnx"])
    done = CliRunner().invoke(
        padding_scaling.STUDY.command, [folder, "--min-rounds", "2", "--out", str(out)]
    )
    assert done.exit_code in (0, 1), done.output  # so small a model has other costs than tokens
    assert markdown(STUDY.load(out)) in done.output
    assert STUDY.load(out).result.workloads[0].measurements[0].rounds
    write_plot(out)
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


def test_a_missing_bundle_is_one_sentence(tmp_path):
    done = CliRunner().invoke(padding_scaling.STUDY.command, [str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert done.output.startswith("Error: ")
    assert "Traceback" not in done.output
