"""The example of docs/tune.md, run as it stands there, with real processes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from crossx import terminal
from crossx.cli.main import main
from crossx.runs import Run

pytest.importorskip("optuna")

PAGE = Path(__file__).parents[2] / "docs/tune.md"
TINY = """
model: {method: crossx, backbone: resnet10t, backbone_args: {channels: [4, 8, 16, 32]}, pretrained: false}
data: {dataset: synthetic, num_classes: 3, images_per_class: 12, image_size: 64, batch_size: 8, num_workers: 0,
  val_fraction: 0.3}
trainer: {max_epochs: 2, logger: false, accelerator: cpu}
"""


def example() -> tuple[str, list[str]]:
    """Return the page's space, and the words of the command that searches it."""
    text = PAGE.read_text(encoding="utf-8")
    (space,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^crossx (tune .*--space space\.yaml .*)$", text, re.MULTILINE)
    return space, shlex.split(command)


@pytest.mark.slow
def test_the_example_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    space, words = example()
    Path("space.yaml").write_text(space)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "trial 4 of 4, " in printed
    folder = Path("runs/tuned")
    results = json.loads((folder / "results.json").read_text())
    assert [trial["number"] for trial in results["trials"]] == [1, 2, 3, 4]
    best = folder / f"trial-{results['best']}"
    assert f"next: crossx test {best}" in printed
    assert all(not (folder / f"trial-{number}/test.json").exists() for number in range(1, 5))

    assert main(["fit", "--config", str(folder / "best.yaml"), "--output", "again"]) == 0
    for name in ("again", str(best)):
        assert "the best of 4 trials of `crossx tune`" in Run(Path(name)).read_info()["tuned"]
    assert main(["report", "again"]) == 0
    assert "the best of 4 trials of `crossx tune`" in Path("again/test/report.html").read_text()
    capsys.readouterr()

    # the same command finds that nothing is left to do
    assert main(words) == 0
    assert "trial 4 of 4, " not in capsys.readouterr().out


def test_the_verb_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["--data.root", "x"], "the following arguments are required: --output"),
        (["--output", "out", "--resume", "x"], "the same command resumes"),
        (["--output", "out"], "which images?"),
        (["--output", "out", "--trials", "0"], "--trials takes a whole number of at least 1"),
        (["--output", "out", "--pruner", "mean"], "--pruner takes median, hyperband, none"),
        (["--output", "out", "--data.root", "x", "--space", "none.yaml"], "none.yaml: no such file"),
        (["--output", "out", "--optim.lrr", "3"], "unknown option '--optim.lrr'"),
    ):
        assert main(["tune", *words]) != 0
        assert message in capsys.readouterr().err
    assert not Path("out").exists()
    assert main(["tune", "--model.method", "mamc", "--print_space"]) == 0
    assert "model.mamc_weight: [0.15, 0.5, 1.5]" in capsys.readouterr().out


def test_no_training_is_announced_before_the_data_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(terminal.SILENT, "1")
    steps: list[str] = []
    monkeypatch.setattr(terminal._steps, "push", steps.append)
    monkeypatch.setattr(terminal._steps, "pop", lambda: None)
    words = "tune --config finetune --model.pretrained false --data.root nowhere --output out"
    assert main(words.split()) == 1
    assert capsys.readouterr().err.startswith("crossx tune: error: nowhere: no such folder.")
    assert steps == ["Checking the configurations"]
    assert not Path("out").exists()
