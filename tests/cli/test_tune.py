from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crossx.cli.main import main
from crossx.errors import CrossXError
from crossx.tuning.outcome import TrialResult


def test_a_trial_that_failed_is_printed_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(*_: Any, report: Any, **__: Any) -> None:
        failed = TrialResult(2, "failed", {}, None, 0, 0.0, Path("out/trial-2"), "killed by SIGKILL.")
        report(failed, TrialResult(1, "complete", {}, 0.5, 1, 1.0, Path("out/trial-1")))
        raise CrossXError("the end.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("crossx.tuning.search.tune", search)
    assert main(["tune", "--config", "finetune", "--data.root", ".", "--output", "out"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "trial 2 of 20, 0 min: failed, killed by SIGKILL. (log: out/trial-2.log) (best: trial 1, 50.00%)"
    )
