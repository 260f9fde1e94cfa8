"""The verbs together on a tiny drawn set, as a user goes through them."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from crossx.cli import quickstart
from crossx.cli.fit import LAUNCHED
from crossx.cli.main import VERBS, main
from crossx.runs import Run
from slow import slow_except

RECIPE = """
model: {method: crossx, backbone: resnet10t, backbone_args: {channels: [4, 8, 16, 32]}, pretrained: false}
data: {dataset: synthetic, num_classes: 3, images_per_class: 9, image_size: 64, batch_size: 4, num_workers: 0}
trainer: {max_epochs: 1, logger: false, accelerator: cpu}
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run ``crossx quickstart`` with a tiny recipe; return its working folder and what it printed."""
    place = tmp_path_factory.mktemp("verbs")
    recipe = place / "tiny.yaml"
    recipe.write_text(RECIPE)
    printed, logged = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(quickstart, "RECIPE", str(recipe))
        patch.setattr("sys.stdout", printed)
        patch.setattr("sys.stderr", logged)
        patch.setenv("COLUMNS", "80")
        assert main(["quickstart", "--seed", "1"]) == 0
    (place / "quickstart.log").write_text(logged.getvalue())
    return place, printed.getvalue()


@pytest.fixture
def place(started: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(started[0])
    monkeypatch.delenv(LAUNCHED, raising=False)
    return started[0]


def test_quickstart_trains_and_tests_both_and_draws_a_picture(started: tuple[Path, str]) -> None:
    place, printed = started
    output = place / "runs/quickstart-1"
    for method in ("plain", "crossx"):
        results = json.loads((output / method / "test.json").read_text())
        assert (results["method"], results["n"], results["seed"]) == (method, 9, 1)
        assert f"  {method:<8} {results['top1']:7.1%}  (" in printed
    assert json.loads((output / "crossx/model.json").read_text())["options"]["osme_placement"] == "output"
    assert "  chance     33.3%" in printed
    parts = json.loads((output / "crossx/test_parts.json").read_text())
    assert parts["verdict"] in " ".join(printed.split())
    with Image.open(output / "predictions.png") as picture:
        assert picture.width > picture.height > 200
    with Image.open(output / "excitations.png") as picture:
        # two excitations and their sum on three images
        assert picture.width > 500 < picture.height
    against = json.loads((output / "crossx/test_against_plain.json").read_text())
    assert f"  difference {100 * against['difference']:+.1f} points (" in printed


def too_long(text: str, width: int) -> list[str]:
    """Return the lines that a terminal would wrap; a word alone on its line, such as a path, is kept in one piece."""
    return [line for line in text.splitlines() if len(line) > width and " " in line.strip()]


def test_lines_of_the_quickstart_fit_the_terminal(started: tuple[Path, str]) -> None:
    place, printed = started
    logged = (place / "quickstart.log").read_text()
    assert "epoch 1/1  val " in logged
    assert too_long(printed + logged, 80) == []
    # a command that was broken can be copied
    assert "$ crossx fit --config" in printed
    assert " \\\n    --" in printed


@pytest.mark.parametrize("width", slow_except([60, 80, 120], 80))
def test_lines_of_the_verbs_fit_the_terminal(
    place: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    runs = ["runs/quickstart-1/plain", "runs/quickstart-1/crossx"]
    photo = next(Path("runs/quickstart-1/images/images").rglob("*.jpg"))
    (place / "bird.jpg").write_bytes(photo.read_bytes())
    check = ["runs/quickstart-1/images", "--data.num_classes", "3", "--data.images_per_class", "9"]
    for words in (
        ["--help"],
        *([verb, "--help"] for verb in VERBS),
        ["datasets", "check", "--help"],
        ["recipes"],
        ["datasets", "list"],
        ["datasets", "check", "synthetic", *check],
        ["compare", "--paper"],
        ["compare", *runs],
        ["test", runs[1], "--against", runs[0]],
        ["predict", runs[1], "bird.jpg"],
    ):
        assert main(words) == 0, words
        shown = capsys.readouterr()
        assert too_long(shown.out + shown.err, width) == [], words


def test_a_pipe_gets_whole_lines(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["compare", "--paper"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert all(line.startswith("| ") or line.startswith("|:") for line in table)
    assert len({line.count(" | ") for line in table[2:]}) == 1


def test_test_prints_what_the_json_holds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = "runs/quickstart-1/crossx"
    assert main(["test", run, "--split", "val", "--data.num_workers", "0", "--data.batch_size", "2"]) == 0
    results = json.loads(Path(run, "val.json").read_text())
    shown = capsys.readouterr().out
    assert f"top-1              {100 * results['top1']:.2f}%" in shown
    assert f"head merged        {100 * results['heads']['merged']:.2f}%" in shown


@pytest.mark.slow
def test_parts_are_printed_as_the_json_holds_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("crossx", "plain"):
        run = f"runs/quickstart-1/{method}"
        assert main(["test", run, "--parts", "--data.num_workers", "0"]) == 0
        shown = capsys.readouterr().out
        results = json.loads(Path(run, "test_parts.json").read_text())
        first = next(iter(results["stages"].values()))["excitations"][0]
        for part, images in results["parts"].items():
            row = next(line.split() for line in shown.splitlines() if line.startswith(f"  {part} "))
            assert row[1:3] == [str(images), f"{first['share'][part]['over_chance']:.2f}"]
        peak = next(line.split() for line in shown.splitlines() if line.startswith("  peak in a part "))
        assert all(len(line) <= 120 for line in shown.splitlines() if not line.startswith("results"))
        assert results["verdict"] in " ".join(shown.split())
        assert peak[4] == f"{first['any_part']['value']:.2f}"
        assert f"results: {run}/test_parts.json\npicture: {run}/test/parts.png\n" in shown
        with Image.open(f"{run}/test/parts.png") as picture:
            assert picture.width > 600
        if method == "crossx":
            assert f"NMI {results['stages']['merged']['consistency']['nmi']:.3f} (" in shown
        else:
            assert "part and excitation" not in shown
            assert "There is one map" in shown


def test_two_runs_are_compared_without_testing_them_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("runs/quickstart-1/plain/test.json").stat().st_mtime_ns
    assert main(["test", "runs/quickstart-1/crossx", "--against", "runs/quickstart-1/plain"]) == 0
    compared = json.loads(Path("runs/quickstart-1/crossx/test_against_plain.json").read_text())
    shown = capsys.readouterr().out
    assert f"difference: {100 * compared['difference']:+.2f} points" in shown
    assert Path("runs/quickstart-1/plain/test.json").stat().st_mtime_ns == before


def test_other_weights_of_a_run_are_tested_before_they_are_compared(place: Path) -> None:
    plain = Path("runs/quickstart-1/plain")
    assert main(["test", f"{plain}/checkpoints/last.ckpt", "--against", "runs/quickstart-1/crossx"]) == 0
    assert json.loads((plain / "test.json").read_text())["weights"] == "checkpoints/last.ckpt"


def test_predictions_are_printed_as_csv(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "runs/quickstart-1/crossx", "runs/quickstart-1/images/images", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 * 27
    assert [row["rank"] for row in rows[:2]] == ["1", "2"]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])


def test_fit_chooses_the_first_free_folder_and_says_what_comes_next(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "runs/tiny-synthetic-1").mkdir()
    words = [
        "fit",
        "--config",
        "tiny.yaml",
        "--model.method",
        "plain",
        "--data.root",
        "runs/quickstart-1/images",
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "dataset   synthetic: 3 classes, images: 15 train, 3 val, 9 test\n" in shown
    assert "run       runs/tiny-synthetic-2\n" in shown
    assert shown.endswith("next: crossx test runs/tiny-synthetic-2\n")
    assert Path("runs/tiny-synthetic-2/model.safetensors").is_file()
    # a process that Fabric starts for a further GPU inherits the folder, and does not ask whether it is free
    monkeypatch.setenv("LOCAL_RANK", "1")
    folders = []
    monkeypatch.setattr(
        "crossx.training.fit.fit", lambda config: folders.append(config.run_path()) or Run(config.run_path())
    )
    assert main(words) == 0
    assert folders == [Path("runs/tiny-synthetic-2")]


def test_fit_starts_from_a_run_and_trains_it_for_longer(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = "runs/quickstart-1/plain"
    words = ["fit", "--config", f"{first}/config.yaml", "--init", first, "--trainer.max_epochs", "1"]
    assert main([*words, "--output", "my runs/next"]) == 0
    shown = capfd.readouterr()
    assert f"(from {first})\n" in shown.out
    assert shown.out.endswith("next: crossx test 'my runs/next'\n")
    assert re.search(rf"init .*{first}: (\d+) of \1 tensors are taken", shown.err)
    assert main(["fit", "--resume", "my runs/next", "--trainer.max_epochs", "2"]) == 0
    assert "epoch" in capfd.readouterr().out
    history = json.loads(Path("my runs/next/metrics.json").read_text())["epochs"]
    assert [row["epoch"] for row in history] == [1, 2]
    info = Run(Path("my runs/next")).read_info()
    assert info["init"]["run"] == str(place / first)
    assert info["extended_after"] == [1]


@pytest.mark.parametrize(("variable", "value"), [("RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2")])
def test_processes_of_one_launcher_need_a_common_folder(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert "give --output" in capsys.readouterr().err


def test_dataset_check_gives_its_exit_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["datasets", "check", "synthetic", "runs/quickstart-1/images"]
    words += ["--data.num_classes", "3", "--data.images_per_class", "9"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["test"] == {"classes": 3, "images": 9}
    image = next(Path("runs/quickstart-1/images/images").rglob("*.jpg"))
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert main(words) == 1
    assert str(image.relative_to("runs/quickstart-1/images")) in capsys.readouterr().out
    image.write_bytes(whole)
