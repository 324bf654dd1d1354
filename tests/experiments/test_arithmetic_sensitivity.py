"""The sensitivity sweep in miniature: one row per setting, kept on a second call, and the effect of lambda."""

from __future__ import annotations

from pathlib import Path

import pytest
from subnets.experiments.arithmetic import sensitivity
from subnets.experiments.arithmetic.sensitivity import START, Setting, settings
from subnets.training.files import read_csv

TINY = {
    "layers": "1", "width": "16", "heads": "2", "base_pairs": "200", "base_epochs": "1", "discovery_pairs": "200",
    "discovery_epochs": "3", "discovery_batch": "50", "num_held_out": "50",
}  # fmt: skip


def test_the_sweep_starts_at_the_papers_setting_and_changes_one_value_at_a_time_or_lambda_and_rate() -> None:
    rows = settings()
    assert rows[0] == START == Setting(lam=1e-7, score_init=-0.1, beta_end=100.0, lr=1e-3)
    assert len(rows) == len(set(rows)) == 17
    changed = [{name for name in vars(START) if getattr(row, name) != getattr(START, name)} for row in rows[1:]]
    assert all(len(names) == 1 or names == {"lam", "lr"} for names in changed)
    assert set().union(*changed) == {"lam", "score_init", "beta_end", "lr"}


def test_each_setting_gives_one_row_and_a_second_call_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [Setting(0.0, 0.1, 10.0, 5e-3), Setting(1.0, 0.1, 10.0, 5e-2)]  # too slow to close a mask; lambda closes all
    monkeypatch.setattr(sensitivity, "settings", lambda: two)
    text = sensitivity.main("quick", TINY, tmp_path / "sweep", show=False)
    rows = read_csv(tmp_path / "sweep" / "sensitivity.csv")
    assert [float(row["lam"]) for row in rows] == [0.0, 1.0] and [row["steps"] for row in rows] == ["12", "12"]
    assert float(rows[0]["density"]) == 1.0 and float(rows[1]["density"]) == 0.0
    assert "| lam | score_init |" in (tmp_path / "sweep" / "sensitivity.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "rows").iterdir()}
    assert sensitivity.main("quick", TINY, tmp_path / "sweep", show=False) == text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "rows").iterdir()} == before


def test_a_sweep_over_several_depths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers must be one depth, got \(1, 2\)"):
        sensitivity.main("quick", {**TINY, "layers": "1,2"}, tmp_path, show=False)
