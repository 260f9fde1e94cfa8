"""``crossx predict``; that all its files say the same is tested in tests/predict/test_outputs.py."""

import csv
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from crossx.cli.main import main
from crossx.predict import collection
from crossx.predict.predictor import Predictor


def test_a_collection_is_predicted_once(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", run, "photos", "--output", "out", "--shard_size", "4", "--device", "cpu"]
    assert main(words) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "6 images, 0 failed: out"
    assert second.startswith("predicted now: 6 images, ")
    assert main(words) == 0
    assert capsys.readouterr().out == "6 images, 0 failed: out\nall of them were predicted before\n"
    assert pq.read_table("out").column("path").to_pylist()[0] == "robin/000.jpg"


def test_a_bad_image_does_not_stop_the_rest(
    run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "photos" / "bad.jpg").touch()
    for _ in range(2):
        assert main(["predict", run, "photos", "--output", "out", "--device", "cpu"]) == 1
        shown = capsys.readouterr()
        assert shown.out.startswith("7 images, 1 failed: out\n")
        assert shown.err == "crossx predict: 1 of 7 images cannot be read: see the column error.\n"


def test_ctrl_c_says_how_to_go_on(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_shard = collection.predict_shard

    def interrupted(*arguments: object) -> bytes:
        if list(Path("out").glob("part-*")):
            raise KeyboardInterrupt
        return predict_shard(*arguments)

    monkeypatch.setattr(collection, "predict_shard", interrupted)
    words = ["predict", run, "photos", "--output", "out", "--shard_size", "2", "--device", "cpu"]
    assert main(words) == 130
    line = "crossx predict: error: stopped after 2 of 6 images; run the same command to continue.\n"
    assert capsys.readouterr().err == line
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main(words) == 0
    assert "predicted now: 4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--engine", "ray"], "--engine needs a folder of predictions: give --output DIR."),
        (["photos", "--workers", "2", "--output", "x.csv"], "--workers needs a folder of predictions"),
        (["photos", "--shard_size", "2", "--output", "x.CSV"], "--shard_size needs a folder"),
        (
            ["photos", "more", "--output", "out"],
            "--output out takes one folder or Parquet file, not 2 paths.",
        ),
        (
            ["photos", "--output", "out.json"],
            "--output out.json: a file of predictions ends in .csv, .jsonl,",
        ),
        (["photos", "--output", "out.json"], "For a folder of that name write out.json/."),
        (["photos", "--features", "out.npy"], "out.npy: must end in .parquet."),
        (["photos", "--features", "out.parquet", "--top", "2"], "--top belongs to predictions"),
        (["photos", "--features", "out.parquet", "--coverage", "0.9"], "--coverage belongs to predictions"),
        (["photos", "--features", "out.parquet", "--accept", "all"], "--accept belongs to predictions"),
        (
            ["photos", "--features", "out.parquet", "--output", "out.csv"],
            "--features cannot be combined with --output: leave one of them out.",
        ),
        (["photos", "--precision", "fp8"], "unknown precision 'fp8'."),
        (["photos", "--crops", "3"], "--crops takes 1, 5, not '3'."),
        (["photos", "--engine", "rai", "--output", "out"], "unknown engine 'rai'. Did you mean 'ray'?"),
        (["photos", "--workers", "2", "--output", "out"], "--workers requires --engine ray."),
        (["photos/robin/000.jpg", "--output", "out"], "is neither a folder nor a .parquet file."),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run: str, place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["predict", run, *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def lines_on_stdin(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_a_list_on_stdin_a_pattern_and_a_table_are_the_files_they_name(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "list.csv").write_text("id,path\n1,photos/robin/002.jpg\n")
    lines_on_stdin(monkeypatch, b"photos/robin/000.jpg\n\nphotos/gone.jpg\r\n")
    words = ["predict", run, "photos/w*/*.jpg", "-", "list.csv", "--device", "cpu"]
    assert main(words) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == [
        "photos/wren/000.jpg",
        "photos/wren/001.jpg",
        "photos/wren/002.jpg",
        "photos/robin/000.jpg",
        "photos/gone.jpg",
        "photos/robin/002.jpg",
    ]
    assert [row["error"] for row in rows] == ["", "", "", "", "no such file", ""]


def test_an_empty_list_on_stdin_is_an_error(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines_on_stdin(monkeypatch, b"\n")
    assert main(["predict", run, "photos", "-", "--device", "cpu"]) == 1
    assert capsys.readouterr() == ("", "crossx predict: error: standard input: lists no files.\n")


def test_a_file_says_how_many_and_how_fast(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", run, "photos", "--output", "deep/out.JSONL", "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "6 images, 0 failed: deep/out.JSONL"
    assert second.endswith(" images/s")
    assert len(Path("deep/out.JSONL").read_text().splitlines()) == 6


def test_features_are_written_in_place_of_predictions(run: str, place: Path) -> None:
    pytest.importorskip("pyarrow", "26", reason="older Arrow cannot read null in a list of fixed size")
    (place / "photos" / "bad.jpg").touch()
    assert main(["predict", run, "photos", "--features", "f.parquet", "--device", "cpu"]) == 1
    table = pq.read_table("f.parquet")
    assert table.column_names == ["path", "feature", "error"]
    assert table["path"].to_pylist()[0] == "photos/bad.jpg"
    assert [value is None for value in table["feature"].to_pylist()] == [True, *[False] * 6]
    assert sum(value**2 for value in table["feature"].to_pylist()[1]) == pytest.approx(1, abs=1e-5)


def test_names_that_are_no_utf8_are_printed_as_they_are(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"photos/\xff.jpg")
    shutil.copy("photos/robin/000.jpg", name)
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="utf-8"))
    assert main(["predict", run, name, "--device", "cpu"]) == 0
    assert shown.getvalue().splitlines()[1].startswith(b"photos/\xff.jpg,")


def test_a_folder_whose_name_has_a_suffix_ends_in_a_slash(run: str, place: Path) -> None:
    assert main(["predict", run, "photos", "--output", "out.v2/", "--device", "cpu"]) == 0
    assert pq.read_table("out.v2").num_rows == 6
    assert main(["predict", run, "photos", "--output", "out.v2", "--device", "cpu"]) == 0


def test_ctrl_c_leaves_no_half_file(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Predictor.answer

    batches = []

    def interrupted(predictor: Predictor, *arguments: Any) -> Any:
        batches.append(list(place.glob(".out.csv.*")))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(predictor, *arguments)

    monkeypatch.setattr(Predictor, "answer", interrupted)
    words = ["predict", run, "photos", "--data.batch_size", "2", "--output", "out.csv", "--device", "cpu"]
    assert main(words) == 130
    assert capsys.readouterr().err == "crossx predict: error: stopped by Ctrl-C.\n"
    assert len(batches[1]) == 1  # a file was begun
    assert [path.name for path in place.iterdir()] == ["photos"]


def test_the_progress_bar_shows_rate_and_remaining_time() -> None:
    from rich.console import Console
    from rich.progress import Progress

    from crossx.evaluation.progress import COLUMNS

    clock = iter(range(100))
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(*COLUMNS, console=console, auto_refresh=False, get_time=lambda: float(next(clock))) as bar:
        task = bar.add_task("Predicting", total=100)
        for _ in range(3):
            bar.advance(task, 20)
        bar.refresh()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "60/100" in shown
    assert re.search(r"\d+\.\d images/s", shown)
    assert re.search(r"0:00:\d\d", shown)
