"""The frame of the studies."""

from click.testing import CliRunner

from tests.bench import results
from trainkit.bench import result
from trainkit.bench.studies import study
from trainkit.bench.studies.study import Study


def test_stolen_time_is_named_once(monkeypatch, tmp_path):
    """A race watches for it by itself."""
    stolen = "other virtual machines took 9% of the CPU time wanted here"
    raced = results.result(noisy=True, noisy_because=(stolen,))
    monkeypatch.setattr(study, "cpu_steal_monitor", lambda: lambda: (stolen,))
    one = Study("one", result.Result, lambda session: raced, lambda result: "measured")
    done = CliRunner().invoke(one.command, ["--out", str(tmp_path / "one.json")])
    assert done.exit_code == 0, done.output
    assert one.load(tmp_path / "one.json").noisy_because == (stolen,)
