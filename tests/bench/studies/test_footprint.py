"""Start and memory of a bundle: a real one, and what growth is refused."""

import sys

import msgspec
import pytest
from click.testing import CliRunner

from trainkit.bench.studies import footprint
from trainkit.bench.studies.cold_start import ColdRun, ColdStart
from trainkit.bench.studies.footprint import STUDY, BundleFootprint, Footprint, check, markdown
from trainkit.bench.studies.random_requests import requests
from trainkit.bench.studies.study import head
from trainkit.serve.errors import CheckFailedError

MB = 1_000_000


def found(rss_mb: list[float], precision: str = "fp32") -> Footprint:
    """Return a result with this much memory after every hundred requests."""
    run = ColdRun(0.5, 210 * MB, 132 * MB)
    start = ColdStart(median_s=0.5, peak_rss_bytes=210 * MB, heavy_modules=(), runs=(run,) * 15)
    one = BundleFootprint(
        precision=precision,
        external_data=False,
        model_sha256="0" * 64,
        model_bytes=91 * MB,
        start=start,
        sampled_every=100,
        rss_bytes=tuple(int(size * MB) for size in rss_mb),
        seconds=10.0,
    )
    return Footprint(**head(), requests=1500, measured=(one,))


def test_memory_that_grows_after_the_first_requests_fails():
    warming = [100.0 + 5 * step for step in range(10)]
    check(found([*warming, 145, 150, 152, 150, 145]))
    with pytest.raises(CheckFailedError, match=r"it grew: fp32 by 6\.9%"):
        check(found([*warming, 145, 150, 155, 150, 145]))  # and gave back: it was needed


def test_the_table_states_goal_and_figure():
    row = markdown(found([200.0] * 10 + [204.0] * 5)).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["fp32", "0.50 s", "0.35 s", "132 MB", "150 MB", "210 MB"]
    assert cells[6:] == ["200 MB", "204 MB", "+2.0%", "5%"]


def test_a_precision_without_a_goal_has_none():
    row = markdown(found([200.0] * 15, "fp16")).splitlines()[2]
    assert row.startswith("| fp16 | 0.50 s | - | 132 MB | - |")


def test_requests_are_the_same_every_time_and_mostly_small():
    made = list(requests(3000, 1000))
    assert made[:20] == list(requests(3000, 1000))[:20]
    sizes = [len(rows) for rows in made]
    lengths = [len(row.ids) for rows in made for row in rows]
    assert min(sizes) == min(lengths) == 1
    assert 16 < max(sizes) <= 32
    assert 450 < max(lengths) <= 512
    assert sum(size <= 3 for size in sizes) > 0.88 * len(sizes)
    assert max(number for rows in made[:50] for row in rows for number in row.ids) < 1000
    assert max(len(row.ids) for rows in requests(500, 1000, 64) for row in rows) <= 64


def test_a_real_bundle_is_started_and_served(tiny_bundles, tmp_path):
    out = tmp_path / "footprint.json"
    arguments = [str(tiny_bundles["onnx"]), "--runs", "1", "--requests", "1200", "--out", str(out)]
    done = CliRunner().invoke(footprint.STUDY.command, arguments)
    assert done.exit_code == 0, done.output
    (one,) = STUDY.load(out).measured
    assert len(one.rss_bytes) == 12
    assert one.resident_bytes is not None
    # The kernel's two counts are not exact.
    assert 20 * MB < one.resident_bytes <= one.start.peak_rss_bytes + MB
    assert one.start.heavy_modules == ()
    assert markdown(STUDY.load(out)) in done.output
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(
            out.read_bytes().replace(b"footprint/2", b"footprint/9"), type=Footprint
        )


def test_a_process_that_dies_is_told(copied, monkeypatch):
    folder = copied("onnx")
    monkeypatch.setattr(footprint.cold_start, "measure", lambda *_: None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckFailedError, match="ended with status 1"):
        footprint.measure_bundle(folder, 1, 1200)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "nowhere"), (["nowhere", "--requests", "1000"], "at least 1100, not 1000")],
)
def test_bad_input_is_one_sentence(arguments, said):
    done = CliRunner().invoke(footprint.STUDY.command, arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output
