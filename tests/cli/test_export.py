"""``crossx export``, and ``crossx predict`` with what it wrote."""

from dataclasses import replace
from pathlib import Path

import pytest

import layouts
from crossx.cli.export import _print_control, _print_moved, _print_thresholds
from crossx.cli.main import main
from crossx.evaluation.intervals import Interval
from crossx.export.export import ControlledAccuracy
from crossx.export.recalibration import Recalibration
from crossx.export.verify import Accuracy, Kept
from crossx.runs import ModelSpec, PredictionSets, Rejection, Run


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
            "--calibration, --accuracy and --max-drop require --precision int8.",
        ),
        (
            ["--output", "x.onnx", "--precision", "int8", "--max-drop", "-1"],
            "--max-drop takes a number of at least 0, not '-1'",
        ),
        (["--output", "x.onnx", "--max_drop", "1"], "Did you mean '--max-drop'?"),
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


def test_says_which_layers_stay_in_float(capsys: pytest.CaptureFixture[str]) -> None:
    interval = Interval(0.0, 0.0)
    accuracy = Accuracy("val", 160, 0.9, 0.9, interval, 160, interval, 160)
    layers = tuple(f"blocks.{number}" for number in range(12))
    _print_control(ControlledAccuracy(0.5, accuracy, layers, layers[:9], trained_on=True))
    shown = capsys.readouterr()
    assert shown.out == (
        "top-1 on 160 validation images: 90.00% before, 90.00% after (--max-drop 0.5 points); 9 of 12 layers back in "
        "float: blocks.0, blocks.1, blocks.2, blocks.3, blocks.4, blocks.5, blocks.6, blocks.7 and 1 more\n"
    )
    first, second = shown.err.splitlines()
    assert first == "note: one of 160 images is 0.62 points, so --max-drop 0.5 lets none be lost."
    assert second.startswith("note: the run was trained on its validation images, too")
    _print_control(ControlledAccuracy(1.0, accuracy, layers, (), trained_on=False))
    shown = capsys.readouterr()
    assert shown.out.endswith("0 of 12 layers back in float\n")
    assert shown.err == ""


@pytest.mark.parametrize(
    ("after", "p_value", "told"),
    [
        (0.97, 1e-9, False),
        (0.93, 1e-9, False),
        (0.9299, 1e-9, True),
        (0.9801, 1e-9, True),
        (0.8, 0.06, False),
    ],
)
@pytest.mark.parametrize("again", [True, False])
def test_says_if_the_threshold_keeps_another_share(
    after: float, p_value: float, told: bool, again: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_moved(Kept(0.95, after, Interval(0.0, 0.0), 90, p_value), "int8", again=again)
    said = capsys.readouterr().err
    assert said.startswith(f"note: int8 keeps {after:.2%} of these images instead of 95.00%, ") == told
    assert said.count("\n") == told
    assert ("although its threshold was set again" in said) == (told and again)
    _print_moved(None, "int8", again=again)
    assert capsys.readouterr().err == ""


def test_says_which_thresholds_were_set_again(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = replace(Run(Path(run)).read_spec(), rejection=Rejection("max_logit", 0.95, 40, {"1": 4.25}))
    sets = PredictionSets(40, {"1": (0.5,)})

    def said(changed: ModelSpec, before: dict[str, float] | None) -> str:
        _print_thresholds(Recalibration("cub", "val", 40, before, changed), None)
        return " ".join(capsys.readouterr().out.split())

    start = "thresholds set again for int8 on 40 val images of cub: "
    assert said(spec, {"1": 5.0}) == f"{start}max_logit at least 4.25 instead of 5"
    both = replace(spec, sets=sets)
    assert said(both, {"1": 5.0}) == f"{start}max_logit at least 4.25 instead of 5, prediction sets"
    assert said(both, None) == f"{start}prediction sets"
    _print_thresholds(None, "birds: no such folder.")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(
        "note: the thresholds are still those of float32: birds: no such folder. To set them"
    )
    assert shown.err.count("\n") == 1
    _print_thresholds(None, None)
    assert capsys.readouterr() == ("", "")
