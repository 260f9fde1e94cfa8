import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def writing(gpu: ModuleType, folder: Path, name: str, before: str = "pass") -> Any:
    """Return a part that writes its result."""
    result = folder / f"{name}.part.json"
    code = f"{before}; open({str(result)!r}, 'w').write('{{}}')"
    return gpu.Part(name, (sys.executable, "-c", code), result)


def test_an_endless_part_is_stopped(gpu: ModuleType, tmp_path: Path) -> None:
    part = writing(gpu, tmp_path, "endless", "import time; time.sleep(600)")
    assert not gpu.run(part, 0.1)
    assert not part.result.exists()


def test_goes_on_with_what_is_left(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [writing(gpu, tmp_path, name) for name in ("one", "two", "three")]
    run, stopped = gpu.run, {"two"}
    monkeypatch.setattr(gpu, "run", lambda part, seconds: part.name not in stopped and run(part, seconds))
    assert gpu.run_all(parts, tmp_path, None) == ["two", "three"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.json"]
    assert gpu.run_all(parts[1:], tmp_path, 0.0) == ["two", "three"]
    stopped.clear()
    assert gpu.run_all(parts[1:], tmp_path, None) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.json", "three.json", "two.json"]


def test_a_failure_is_named(gpu: ModuleType, tmp_path: Path) -> None:
    part = writing(gpu, tmp_path, "one", "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="one failed with exit code 3"):
        gpu.run_all([part], tmp_path, None)


def test_parts_that_need_images_are_left_out_without_them(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "training-bf16.json").write_text("{}")
    gpu.main(["--list", "--output", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    done = {row[1]: row[3] for row in rows}
    assert {"inference-bf16-64", "training-fp32", "training-tf32"} < set(done)
    assert {name for name, state in done.items() if state == "yes"} == {"training-bf16"}
    assert not {"fed-none", "methods"} & set(done)
    gpu.main(["--list", "--output", str(tmp_path), "--data-root", str(tmp_path)])
    assert {"fed-none", "methods"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "training"], "--part: no training; there are inference-fp32-1"),
        (["--dry-run"], "--dry-run needs --output"),
        ([], "no GPU was found"),
    ],
)
def test_what_cannot_work_is_refused(
    gpu: ModuleType,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu.main(words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_targets_stand_next_to_the_results(gpu: ModuleType, tmp_path: Path) -> None:
    step = {
        "median_s": 0.5,
        "images_per_second": 64.0,
        "over_plain": {"median": 1.25},
        "peak_bytes": {"median": 2**31},
    }
    reach = [
        {"what": "time of crossx / plain", "ratio": 1.25, "reach": 1.35, "reached": True},
        {"what": "images per second", "value": 64.0, "at_least": 1500, "reached": False},
    ]
    result = {
        "machine": {"gpu": "NVIDIA X", "cpu": "", "versions": {"torch": "2.14"}},
        "steps": {"crossx": step},
        "reach": reach,
    }
    (tmp_path / "training-bf16.json").write_text(json.dumps(result))
    lines = gpu.report(tmp_path, ["training-bf16"]).splitlines()
    assert lines[0] == "## NVIDIA X, torch 2.14"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert ["crossx", "500", "64", "1.250", "", "2.00"] in cells
    assert ["training-bf16", "time of crossx / plain", "≤ 1.35", "1.25", "yes"] in cells
    assert ["training-bf16", "images per second", "≥ 1500", "64", "no"] in cells


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert "nothing is left" in capsys.readouterr().out
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for file in tmp_path.glob("*.json"):
        assert f"**{file.stem}**" in text
    assert {"inference-tf32-2", "training-bf16", "fed-ram", "methods"} <= {
        file.stem for file in tmp_path.glob("*.json")
    }
