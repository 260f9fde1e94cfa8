import csv
import json
from pathlib import Path

import numpy as np
import pytest

from crossx.cli.main import main
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.runs import write_json

CLASSES = 4


def write_run(folder: Path, correct: list[bool], dataset: str = "cub") -> None:
    """Write what a trained and tested run holds, as far as a comparison reads it."""
    n = len(correct)
    write_json(folder / "model.json", {})
    (folder / "model.safetensors").touch()
    targets = np.arange(n) % CLASSES
    guesses = np.where(correct, targets, (targets + 1) % CLASSES)
    logits = np.eye(CLASSES, dtype=np.float32)[guesses]
    paths = np.array([f"{index}.jpg" for index in range(n)])
    Predictions(logits, targets, paths, np.array(list("abcd"))).save(predictions_path(folder, "test"))
    accuracy = sum(correct) / n
    results = {"top1": accuracy, "top5": 1.0, "class_mean": accuracy, "ece": 0.02, "n": n}
    results |= {
        "intervals": {"top1": [0.0, 1.0]},
        "method": "crossx",
        "backbone": "local-dir:/home/me/resnet",
    }
    results |= {"dataset": dataset, "num_classes": CLASSES, "seed": 3, "preprocessing": {"image_size": 160}}
    write_json(folder / "test.json", results)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"), [True, True, False, False, True, False, True, False])
    write_run(Path("two"), [True, True, True, True, True, False, True, True])
    write_run(Path("other"), [True, False, True], dataset="synthetic")
    return tmp_path


def table(text: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_each_run_is_held_against_the_first_on_the_same_images(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "one", "two", "other"]) == 0
    one, two, other = table(capsys.readouterr().out)
    assert (one["run"], one["backbone"], one["images"]) == ("one", "resnet", "8")
    assert one["top-1 (95%)"].startswith("50.00 ")
    assert two["Δ first (95%)"].startswith("+37.50 ")
    # three of three discordant images are the second's: 2 / 2^3
    assert two["p"] == "0.25"
    assert other["Δ first (95%)"] == "–"


def test_the_paper_stands_below_with_table_and_row_and_another_task_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "one", "--paper", "--output", "out/cub"]) == 0
    printed = capsys.readouterr().out
    rows = table(printed)
    assert [row["from"] for row in rows[1:3]] == [
        "Table 4, row 1, several crops",
        "Table 4, row 2, several crops",
    ]
    assert rows[-1]["top-1 (95%)"] == "87.7"
    assert (
        "note: one is tested on 8 images of 4 classes, the paper's cub has 5794 of 200: not the same task."
        in printed
    )
    written = json.loads(Path("out/cub.json").read_text())
    assert len(written["published"]) == 13
    assert len(list(csv.DictReader(Path("out/cub.csv").read_text().splitlines()))) == 14
    assert Path("out/cub.tex").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["."], "not a run folder"),
        (["one", "--split", "val"], "one: not tested on val yet: run `crossx test one --split val` first."),
        (
            ["other", "--paper"],
            "the paper has nothing on synthetic, only on aircraft, cars, cub, dogs, nabirds",
        ),
        (["one", "--papre"], "Did you mean '--paper'?"),
        ([], "required: RUN"),
    ],
)
def test_what_cannot_be_compared_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["compare", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
