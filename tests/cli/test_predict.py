"""``crossx predict`` into a folder; its table of single images is tested in test_verbs.py."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import layouts
from crossx.cli.main import main
from crossx.deploy import collection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(layouts.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=3)
    return tmp_path


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
    line = "crossx predict: error: stopped after 2 of 6 images; the same command goes on from there.\n"
    assert capsys.readouterr().err == line
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main(words) == 0
    assert "predicted now: 4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--engine", "ray"], "--engine belongs to a folder of predictions: give --output DIR."),
        (["photos", "--workers", "2", "--output", "x.csv"], "--workers belongs to a folder of predictions"),
        (["photos", "--shard_size", "2", "--output", "x.CSV"], "--shard_size belongs to a folder"),
        (
            ["photos", "more", "--output", "out"],
            "--output out takes one folder or Parquet file, not 2 paths.",
        ),
        (["photos", "--engine", "rai", "--output", "out"], "unknown engine 'rai'. Did you mean 'ray'?"),
        (["photos", "--workers", "2", "--output", "out"], "--workers belongs to --engine ray."),
        (["photos/robin/000.jpg", "--output", "out"], "is neither a folder nor a .parquet file."),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run: str, place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["predict", run, *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
