"""``crossx export``, and ``crossx predict`` with what it wrote."""

from pathlib import Path

import pytest

import layouts
from crossx.cli.main import main


def test_says_what_it_wrote_and_how_it_compares(
    run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run, "--output", "out/x.safetensors", "--images", "photos"]) == 0
    shown = capsys.readouterr()
    written, compared = shown.out.splitlines()
    assert written.startswith(
        "out/x.safetensors: crossx (test_resnet), safetensors fp32, images uint8 (batch, 3, 64, 64), 3 classes, "
    )
    assert compared.startswith("against eager float32 on 6 images (photos): logits differ by at most ")
    assert compared.endswith("of the largest (tolerance 1e-04), same class on 6")
    assert shown.err == ""


def test_random_pixels_are_told(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", run, "--output", "x.safetensors"]) == 0
    shown = capsys.readouterr()
    assert "on 16 images (random pixels: dataset 'folder' needs --data.root" in shown.out
    assert shown.err == "note: --images DIR compares on real images.\n"


def test_predict_takes_the_file(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", run, "--output", "x.safetensors", "--images", "photos"]) == 0
    capsys.readouterr()
    tables = []
    for network in (run, "x.safetensors"):
        assert main(["predict", network, "photos", "--device", "cpu"]) == 0
        tables.append([line.split(",")[:2] for line in capsys.readouterr().out.splitlines()])
    assert tables[0] == tables[1]
    assert main(["predict", "x.safetensors", "photos", "--output", "out"]) == 0
    assert capsys.readouterr().out.startswith("6 images, 0 failed: out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--output", "x.txt"], "must end in the suffix of a format"),
        (["--output", "x.onnx", "--tolerance", "-1"], "--tolerance takes a number of at least 0, not '-1'"),
        (["--output", "x.pt2", "--precison", "fp16"], "Did you mean '--precision'?"),
        (
            ["--output", "x.pt2", "--calibration", "9"],
            "--calibration and --accuracy require --precision int8.",
        ),
        (["--output", "folder.pt2"], "folder.pt2 is a folder: give the name of a file."),
    ],
)
def test_wrong_commands_are_refused(
    words: list[str], message: str, run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.pt2").mkdir()
    assert main(["export", run, *words]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "test FILE", "report FILE", "report FILE --output page.html", "calibrate FILE --split test",
        "explain FILE photos --output maps", "export FILE --output y.safetensors", "share FILE --output shared",
        "predict FILE photos --features features.parquet",
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["elsewhere", "beside"])
def test_what_needs_the_network_refuses_an_exported_file(
    words: str, folder: str, run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words.startswith(("share", "predict")):
        file = place / "x.safetensors"
        assert main(["export", run, "--output", str(file), "--images", "photos"]) == 0
    else:
        file = (layouts.write_run(place / "beside") if folder == "beside" else place) / "x.onnx"
        file.touch()
    capsys.readouterr()
    assert main([str(file) if word == "FILE" else word for word in words.split()]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "Give the run" in line
    assert not Path("shared").exists()
    assert not Path("features.parquet").exists()
