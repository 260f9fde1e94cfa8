import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from crossx.cli.main import main
from crossx.data.catalog import dataset_info
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.recipes import Recipe, Setting, list_recipes, load_recipe
from crossx.report import published
from crossx.runs import read_json, write_json
from crossx.training.config import Config

CLASSES = 4


def write_run(
    folder: Path, correct: list[bool], dataset: str = "cub", root: str | None = None, first: int = 0
) -> None:
    """Write what a trained and tested run holds, as far as a comparison reads it."""
    n = len(correct)
    write_json(folder / "model.json", {})
    (folder / "model.safetensors").touch()
    targets = np.arange(n) % CLASSES
    guesses = np.where(correct, targets, (targets + 1) % CLASSES)
    logits = np.eye(CLASSES, dtype=np.float32)[guesses]
    paths = np.array([f"{index}.jpg" for index in range(n)])
    contents = None if root is None else np.arange(first, first + n, dtype=np.uint64)
    Predictions(logits, targets, paths, np.array(list("abcd")), contents).save(
        predictions_path(folder, "test")
    )
    accuracy = sum(correct) / n
    results = {"top1": accuracy, "top5": 1.0, "class_mean": accuracy, "ece": 0.02, "n": n}
    results |= {
        "intervals": {"top1": [0.0, 1.0]},
        "method": "crossx",
        "backbone": "local-dir:/home/me/resnet",
    }
    results |= {"data_root": root} if root else {}
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
    printed = capsys.readouterr().out
    one, two, other = table(printed)
    assert (one["run"], one["backbone"], one["images"]) == ("one", "resnet", "8")
    assert one["top-1 (95%)"].startswith("50.00 ")
    # of four classes it would be 100%
    assert "top-5" not in one
    assert two["Δ first (95%)"].startswith("+37.50 ")
    # three of three discordant images are the second's: 2 / 2^3
    assert two["p"] == "0.25"
    assert other["Δ first (95%)"] == "–"
    assert (
        "note: other was not tested on the images and labels of one: do not compare their accuracies."
        in printed
    )


def test_folders_are_told_apart_and_other_images_are_noted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [True, False, True, True]
    for name, root, first in (
        ("a", "x/birds", 0),
        ("moved", "photos", 0),
        ("b", "y/birds", 7),
        ("c", "table.csv", 9),
        ("listed", "table.csv", 0),
    ):
        write_run(Path(name), right, "table" if root.endswith("csv") else "folder", root, first)
    assert main(["compare", "a", "moved"]) == 0
    printed = capsys.readouterr().out
    assert [row["dataset"] for row in table(printed)] == ["folder birds", "folder photos"]
    assert "note" not in printed
    assert main(["compare", "a", "moved", "b", "c", "listed"]) == 0
    printed = capsys.readouterr().out
    rows = table(printed)
    assert [row["dataset"] for row in rows] == [
        f"folder {place / 'x' / 'birds'}",
        "folder photos",
        f"folder {place / 'y' / 'birds'}",
        "table table.csv",
        "table table.csv",
    ]
    assert [row["p"] for row in rows] == ["–", "1", "–", "–", "1"]
    notes = [line for line in printed.splitlines() if line.startswith("note")]
    assert len(notes) == 1
    assert "b, c were not tested on the images and labels of a" in notes[0]


def test_top5_is_left_out_where_the_results_have_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, changes in (("one", {"top5": 0.875}), ("two", {})):
        results = {key: value for key, value in read_json(Path(name, "test.json")).items() if key != "top5"}
        write_json(Path(name, "test.json"), results | {"num_classes": 6} | changes)
    assert main(["compare", "one", "two"]) == 0
    one, two = table(capsys.readouterr().out)
    assert (one["top-5"], two["top-5"]) == ("87.50", "–")


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
        (["nowhere", "--paper"], "nowhere: no such run folder"),
    ],
)
def test_what_cannot_be_compared_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["compare", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def write_reproduction(
    folder: Path, *, epochs: int, recipe: str = "crossx_cars_resnet50", **changed: object
) -> None:
    """Write a run of a recipe as if it had been tested on all images of the paper's test set."""
    write_run(folder, [True, True, False, False])
    config = Config.from_recipe(recipe, trainer={"max_epochs": epochs})
    (folder / "config.yaml").write_text(config.to_yaml())
    classes, _, images = dataset_info(config.data.dataset).table1 or (0, 0, 0)
    results = json.loads((folder / "test.json").read_text())
    results |= {
        "method": config.model.method,
        "options": config.model.options,
        "dataset": config.data.dataset,
    }
    results |= {"backbone": config.model.backbone, "preprocessing": {"image_size": config.data.image_size}}
    results |= {"num_classes": classes, "n": images, "class_mean": 0.25, **changed}
    write_json(folder / "test.json", results)


def test_all_rows_of_the_paper_are_listed_with_their_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--paper"]) == 0
    rows = {row["from"]: row for row in table(capsys.readouterr().out)}
    assert len(rows) == 51
    assert {row["ours"] for row in rows.values()} == {"not measured"}
    assert rows["Table 3, row 1"]["recipe"] == "probe_nabirds_alexnet"
    assert rows["Table 5, row 7"] == {
        "from": "Table 5, row 7", "dataset": "cars", "method": "Kernel-Pooling", "backbone": "VGGNet",
        "published": "92.4", "ours": "not measured", "runs": "–", "recipe": "kernel_pooling_cars_vgg16",
    }  # fmt: skip
    # every method of ours has the recipes of all its rows
    ours = {
        "AlexNet-fc6",
        "FCAN",
        "MaxEnt-CNN",
        "SENet-50",
        "ResNet-50",
        "Cross-X",
        "NTS-Net",
        "Kernel-Pooling",
        "MAMC-CNN",
    }
    for row in rows.values():
        if row["method"] in ours | {"DFB-CNN"}:
            assert row["recipe"] in list_recipes()
            described = load_recipe(row["recipe"]).description
            assert f"{float(row['published']):.1f}%" in described
            assert ("class-mean" in described) == row["from"].startswith("Table 7")


def test_runs_of_a_folder_are_found_for_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_reproduction(Path("runs/a"), epochs=30, top1=0.94)
    write_reproduction(Path("runs/b"), epochs=3, top1=0.92)
    # as of a version that did not have an option yet
    config = Path("runs/a/config.yaml")
    config.write_text(re.sub(r"  fit_heads: 0\n", "", config.read_text()))
    assert "fit_heads" not in config.read_text()
    write_reproduction(Path("runs/c"), epochs=30, top1=0.1, num_classes=4, n=8)  # not the paper's task
    write_reproduction(Path("runs/d"), epochs=30, top1=0.1, options={})  # another network
    write_reproduction(Path("runs/e"), epochs=30, top1=0.1, preprocessing={"image_size": 224})
    write_reproduction(Path("runs/f"), epochs=30, recipe="crossx_aircraft_resnet50", top1=0.1, class_mean=0.5)
    write_json(Path("runs/g/model.json"), {})  # not tested
    (Path("runs/g") / "model.safetensors").touch()
    assert main(["compare", "runs", "--paper", "--output", "all"]) == 0
    printed = capsys.readouterr().out
    rows = {row["from"]: row for row in table(printed)}
    assert len(rows) == 51
    assert (rows["Table 5, row 13"]["ours"], rows["Table 5, row 13"]["runs"]) == ("93.0", "runs/a, runs/b")
    assert rows["Table 7, row 9"]["ours"] == "50.0"
    assert sum(row["ours"] != "not measured" for row in rows.values()) == 2
    note = "note: runs/b is not trained as crossx_cars_resnet50: trainer.max_epochs 3 instead of 30."
    assert [line for line in printed.splitlines() if line.startswith("note")] == [note]
    written = {
        row["table"] * 100 + row["row"]: row for row in json.loads(Path("all.json").read_text())["published"]
    }
    assert written[513]["our_runs"] == ["runs/a", "runs/b"]
    assert written[513]["ours"] == pytest.approx(0.93)
    assert len(list(csv.DictReader(Path("all.csv").read_text().splitlines()))) == 51

    # runs that are named: the rows of their dataset below them
    assert main(["compare", "runs/a", "--paper"]) == 0
    named = table(capsys.readouterr().out)
    assert len(named) == 14
    assert named[-1]["ours"] == "94.0"
    assert named[-1]["recipe"] == "crossx_cars_resnet50"


def test_a_recipe_that_lands_appears(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Recipe("ra_cnn_cub_vgg19", settings={
        ("model", "method"): Setting("ra_cnn"), ("model", "backbone"): Setting("vgg19.tv_in1k"),
        ("data", "dataset"): Setting("cub"),
    })  # fmt: skip
    monkeypatch.setattr(published, "list_recipes", lambda: [made.name])
    monkeypatch.setattr(published, "load_recipe", lambda name: made)
    assert main(["compare", "--paper"]) == 0
    found = {row["from"]: row["recipe"] for row in table(capsys.readouterr().out) if row["recipe"] != "none"}
    assert found == {"Table 4, row 2, several crops": "ra_cnn_cub_vgg19"}
