import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from crossx.ablation import runner
from crossx.ablation.runner import Trial
from crossx.ablation.suite import list_suites
from crossx.cli.main import main
from crossx.errors import CrossXError

ONE_AT_A_TIME = threading.Lock()

RECIPE = """
model: {method: crossx, backbone: resnet10t, backbone_args: {channels: [4, 8, 16, 32]}, pretrained: false}
data: {dataset: synthetic, num_classes: 2, images_per_class: 6, image_size: 64, batch_size: 4, num_workers: 0}
trainer: {max_epochs: 1, logger: false, accelerator: cpu}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    Path("suite.yaml").write_text("variants: {crossx: {}, plain: {model: {method: plain}}}")
    return tmp_path


def ablate(*more: str) -> int:
    recipe = [] if "--config" in more else ["--config", "tiny.yaml"]
    command = ["ablate", "--suite", "suite.yaml", *recipe, "--data.root", "images", "--output", "out"]
    return main([*command, *more])


def test_a_missing_earlier_file_is_said_before_images_are_drawn(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("--data.root", "drawn", "--earlier", "none.json") == 1
    assert "none.json: no such file" in capsys.readouterr().err
    assert not (place / "drawn").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "fig5"], "Did you mean 'fig"),
        (["--seeds", "a"], "--seeds takes a whole number of at least 0, not 'a'"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (["--seed", "1"], "--seeds gives the seeds"),
        (["--resume", "out"], "the same command resumes"),
        (["--jobs", "0"], "--jobs takes a whole number of at least 1, not '0'"),
        (["--against", "corssx"], "Did you mean 'crossx'?"),
        (["--config", "none.yaml"], "no such file"),
        (["--optim.lrr", "1"], "Did you mean '--optim.lr'"),
        (["--model.method", "plane"], "Did you mean 'plain'"),
        (["--data.dataset", "folder", "--data.root", "nowhere"], "dataset 'folder' has no option"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert ablate(*more) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("crossx ablate: error: ")
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_help_names_every_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(list_suites())}, or a YAML file" in shown


def test_tuning_without_validation_images_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("suite.yaml").write_text("variants: {crossx: {}}\ntune: [{optim: {lr: 0.1}}]")
    assert ablate("--data.val_fraction", "0") == 2
    assert "give a larger --data.val_fraction." in capsys.readouterr().err
    assert not Path("out").exists()


def call_here(crew: object, trial: Trial, place: object, arguments: Sequence[str], *_: object) -> None:
    """Stand in for the process of a trial."""
    with ONE_AT_A_TIME, trial.log.open("a") as log, contextlib.redirect_stderr(log):
        code = main(arguments)
    if code != 0:
        raise CrossXError(runner._reason(trial.log, code))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [False, True])
def test_options_are_chosen_on_validation_and_nothing_is_trained_twice(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    if not processes:
        monkeypatch.setattr(runner.Processes, "_call", call_here)
    variants = "variants: {plain: {model: {method: plain}}}"
    Path("suite.yaml").write_text(f"{variants}\ntune: [{{optim: {{lr: 1e30}}}}, {{optim: {{lr: 0.003}}}}]")
    more = ["--data.val_fraction", "0.4", "--jobs", "2", "--seeds", "0"]
    assert ablate(*more) == 1
    printed = capsys.readouterr().out
    assert "failed: plain, alternative 1, seed 0: crossx fit: error: " in printed
    assert "| plain " in printed
    for name in ("table.md", "table.csv", "table.tex", "chart.png"):
        assert Path("out", name).stat().st_size > 0
    rows = json.loads(Path("out/results.json").read_text())["tuning"]
    assert [row["changes"] for row in rows] == [{}, {"optim": {"lr": 1e30}}, {"optim": {"lr": 0.003}}]
    assert rows[1]["val_top1"] is None
    best = max(row["val_top1"] for row in rows if row["val_top1"] is not None)
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["val_top1"] == best
    tested = [path.parent for path in Path("out").rglob("test.json")]
    folder = f"tune-{chosen['alternative']}/" if chosen["alternative"] else ""
    assert tested == [Path(f"out/plain/{folder}seed-0")]
    lines = Path("out/tuning.md").read_text().splitlines()
    (line,) = [line for line in lines if line.endswith(" chosen |")]
    assert line.startswith("| plain")

    assert "\nepoch 1/1 " in Path("out/plain/seed-0.log").read_text()

    Path("suite.yaml").write_text(variants)
    trained = Path("out/plain/seed-0/model.safetensors").stat().st_mtime_ns
    tables = []
    for _ in range(2):
        assert ablate(*more) == 0
        printed = capsys.readouterr().out
        tables.append(printed[printed.index("\n| variant") :])
    assert tables[0] == tables[1]
    assert Path("out/plain/seed-0/model.safetensors").stat().st_mtime_ns == trained

    assert ablate(*more, "--earlier", "out/results.json", "--output", "elsewhere") == 0
    printed = capsys.readouterr().out
    assert printed[printed.index("\n| variant") :].splitlines()[:4] == tables[0].splitlines()[:4]
    assert not Path("elsewhere/plain").exists()
