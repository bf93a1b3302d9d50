import time

import pytest

from trainkit.bench.studies import quiet_machine


def test_a_quiet_machine_is_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_machine, "BUSY_S", 0.01)
    monkeypatch.setattr(quiet_machine, "PAUSE_S", 0.01)
    looks = iter([("25%",), ("10%",), ()])
    monkeypatch.setattr(quiet_machine, "cpu_steal_monitor", lambda: lambda: next(looks))
    told: list[str] = []
    quiet_machine.wait_until_quiet(60, told.append)
    assert told == [f"waiting for a quiet machine: {share}%" for share in (25, 10)]
    monkeypatch.setattr(quiet_machine, "cpu_steal_monitor", lambda: lambda: ("50%",))
    before = time.monotonic()
    quiet_machine.wait_until_quiet(0.2, told.append)
    assert 0.2 <= time.monotonic() - before < 5
