"""The budgets of tokens side by side: a real bundle, and what is refused."""

import msgspec
import pytest
from click.testing import CliRunner

from tests.bench import results
from trainkit.bench.studies import token_budget
from trainkit.bench.studies.token_budget import Batches, check, load, markdown
from trainkit.serve.errors import CheckFailedError


def race(**call_ms: float) -> Batches:
    """Return a result in which a batch takes so many milliseconds for each budget, else 1."""
    times = {budget: call_ms.get(f"at_{budget}", 1.0) for budget in token_budget.BUDGETS}
    ordered = {token_budget.BASELINE: times[token_budget.BASELINE], **times}
    truths = [
        results.Truth(f"{budget} tokens", budget, "onnx", ms, 0.0) for budget, ms in ordered.items()
    ]
    return Batches(races=(results.result(truths),))


def test_every_budget_computes_the_same_of_a_real_bundle(
    tiny_bundles, splits, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_budget, "BUDGETS", ("64", "512", "2048", "whole"))
    data = tmp_path / "few.csv"
    rows = [f'"{one.text}",{one.label}' for one in splits.train[:120] if '"' not in one.text]
    data.write_text("\n".join(["text,label", *rows]))
    out = tmp_path / "batches.json"
    arguments = [str(tiny_bundles["onnx"]), "--data", str(data), "--texts", "12", "--out", str(out)]
    done = CliRunner().invoke(
        token_budget.main, [*arguments, "--min-seconds", "0", "--min-rounds", "3"]
    )
    assert done.exit_code in (0, 1), done.output  # 1: on a busy machine 512 tokens may look slow
    assert "not the outputs" not in done.output
    (raced,) = load(out).races
    assert {engine.runtime for engine in raced.engines} == set(token_budget.BUDGETS)
    assert raced.engines[0].runtime == "2048"
    assert markdown(load(out)) in done.output


def test_a_default_that_is_slower_than_the_baseline_fails():
    check(race())
    check(race(at_512=0.5, at_4096=3.0))
    with pytest.raises(CheckFailedError, match=r"512 tokens a forward, .* change CPU_TOKENS"):
        check(race(at_512=1.5))


def test_a_budget_that_computes_something_else_fails():
    sound = race().races[0]
    wrong = results.result([results.ONNX, results.WRONG])
    with pytest.raises(CheckFailedError, match="not the outputs"):
        check(Batches(races=(sound, wrong)))


def test_the_table_has_the_budgets_in_their_order_with_the_ratio_of_each():
    lines = markdown(race(at_512=0.5)).splitlines()
    assert lines[0].startswith("**sample, test, fp32: 512 texts in batches of 32, 42 % padding")
    rows = [line.split(" | ") for line in lines[4:11]]
    assert [row[0] for row in rows] == [f"| {budget} tokens" for budget in token_budget.BUDGETS]
    assert rows[4][2] == "1 |"
    assert 1.8 < float(rows[2][2].split()[0]) < 2.2


@pytest.mark.parametrize("kind", ["torchscript", "equal lengths", "nowhere"])
def test_a_folder_that_cannot_be_cut_is_one_sentence(kind, copied, tmp_path, monkeypatch):
    folder = tmp_path / "nowhere"
    if kind == "torchscript":
        folder = copied("torchscript")
    elif kind == "equal lengths":
        folder = copied("onnx")
        opened = token_budget.open_bundle(folder)
        manifest = msgspec.structs.replace(opened.manifest, equal_lengths=True)
        changed = opened._replace(manifest=manifest)
        monkeypatch.setattr(token_budget, "open_bundle", lambda _: changed)
    done = CliRunner().invoke(token_budget.main, [str(folder), "--data", str(tmp_path)])
    assert done.exit_code == 2
    assert str(folder) in done.output
    assert "Traceback" not in done.output
