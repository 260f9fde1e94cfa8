"""``crossx explain``: what it writes, says and refuses."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import layouts
from crossx.cli import explain
from crossx.cli.main import main
from crossx.data.transforms import eval_transform
from crossx.explain import figures, plotting
from crossx.explain.maps import Explanation, Kind
from crossx.predict.predictor import Predictor

STAGES = ("previous", "last", "merged")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=2)
    return tmp_path


def written() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir())


def test_each_image_has_a_picture_and_all_a_sheet(
    run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", run, "photos", "--output", "out", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "4 images: out/contact.jpg\n"
    # the images of both classes are called 000.jpg and 001.jpg
    assert written() == ["000.png", "001.png", "contact.jpg", "wren_000.png", "wren_001.png"]
    with Image.open("out/000.png") as one, Image.open("out/contact.jpg") as sheet:
        assert one.width > 8 * one.height / 2
        assert (sheet.format, sheet.height > one.height) == ("JPEG", True)


@pytest.mark.slow
def test_saved_maps_are_the_networks(run: str, place: Path) -> None:
    words = ["photos/wren/000.jpg", "--output", "out", "--maps", "both", "--save-maps", "--class", "wren"]
    assert main(["explain", run, *words, "--device", "cpu"]) == 0
    assert written() == ["000.npz", "000.png", "contact.jpg"]
    predictor = Predictor.load(run, device="cpu")
    batch = predictor.inputs("photos/wren/000.jpg")
    with torch.no_grad():
        activation = predictor.method.activation_maps(batch)
        of_class = predictor.method.class_activation_maps(
            batch, torch.tensor([predictor.classes.index("wren")])
        )
    assert of_class is not None
    with np.load("out/000.npz") as saved:
        assert len(saved.files) == 3 * 2 + 2 + 3 * 2
        for stage in STAGES:
            for part in (1, 2):
                expected = activation[stage][0, part - 1].numpy()
                np.testing.assert_allclose(saved[f"{stage} part {part}"], expected, rtol=1e-4, atol=1e-5)
                expected = of_class[stage][0, part - 1].numpy()
                np.testing.assert_allclose(saved[f"CAM {stage} part {part}"], expected, rtol=1e-4, atol=1e-5)


def test_boxes_are_saved_with_the_maps(place: Path) -> None:
    run = str(layouts.write_run(place / "run", method="nts"))
    words = ["photos/wren/000.jpg", "--output", "out", "--save-maps", "--device", "cpu"]
    assert main(["explain", run, *words]) == 0
    predictor = Predictor.load(run, device="cpu")
    with np.load("out/000.npz") as saved:
        assert saved.files == ["last", "boxes"]
        expected = predictor.method.boxes(predictor.inputs("photos/wren/000.jpg"))
        np.testing.assert_array_equal(saved["boxes"], expected[0])


@pytest.mark.slow
def test_colormap_and_opacity_reach_the_picture(run: str, place: Path) -> None:
    def colours(*words: str) -> np.ndarray:
        assert main(["explain", run, "photos/wren/000.jpg", "--output", f"out{len(words)}", *words]) == 0
        with Image.open(f"out{len(words)}/000.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        # the second of ten cells of 1.56 inches, without the image before it
        return pixels[100:290, 590:810]

    assert np.ptp(colours("--opacity", "0"), axis=2).max() <= 6
    assert np.ptp(colours("--opacity", "1", "--colormap", "gray"), axis=2).max() <= 6
    assert np.ptp(colours(), axis=2).max() > 40


@pytest.mark.slow
def test_the_sheet_says_right_where_the_folder_is_a_class(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[list[str]] = []

    def draw(rows: list[figures.FigureRow], **options: Any) -> figures.MapFigure:
        texts.append([row.text for row in rows])
        return drawn(rows, **options)

    drawn = figures.draw
    monkeypatch.setattr(figures, "draw", draw)
    layouts.write_image(place / "elsewhere/a.jpg", 0, 0)
    assert main(["explain", run, "photos/wren/000.jpg", "elsewhere", "--output", "out"]) == 0
    (wren,), (unknown,), sheet = texts
    assert sheet == [wren, unknown]
    assert "\nright" in wren or "\nwrong, it is:\nwren" in wren
    assert unknown.split("\n")[0] == "a.jpg"
    assert len(unknown.split("\n")) == 3


@pytest.mark.slow
def test_many_images_make_several_sheets(run: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a page has room for three rows: five images are on pages of three and two
    monkeypatch.setattr(explain, "SHEET_HEIGHT", 4.5)
    layouts.write_image(place / "contact-2.jpg", 0, 0)
    assert main(["explain", run, "photos", "contact-2.jpg", "--output", "out"]) == 0
    sheets = ["contact-2.jpg", "contact.jpg"]
    images = ["000.png", "001.png", f"{place.name}_contact-2.png", "wren_000.png", "wren_001.png"]
    assert written() == sorted(images + sheets)
    heights = [Image.open(f"out/{name}").height for name in sheets]
    assert heights[0] < heights[1] <= 4.5 * explain.SHEET_DPI


@pytest.mark.parametrize("images", [1, 3, 20, 50])
@pytest.mark.parametrize(
    "names",
    [(), ("last",), tuple(f"{stage} part {part}" for stage in "abcd" for part in (1, 2)),
     tuple(f"{kind}last part {part}" for kind in ("", "CAM ") for part in range(1, 17))],
    ids=["none", "one", "eight", "thirty-two"],
)  # fmt: skip
def test_sheets_are_pages_of_bounded_size(
    names: tuple[str, ...], images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[tuple[int, float, float]] = []

    def draw(rows: list[figures.FigureRow], **options: Any) -> Figure:
        # the layout is that of the figure; no picture is drawn
        across = options["across"]
        layout = figures._layout(rows[0].explanation.maps)
        grid = figures._Grid(layout, -(-len(rows) // across), across, options["cell"])
        pages.append((len(rows), grid.width, grid.height))
        return grid.figure

    monkeypatch.setattr(figures, "draw", draw)
    monkeypatch.setattr(plotting, "save_jpeg", lambda *_: None)
    maps = dict.fromkeys(names, np.eye(2, dtype=np.float32))
    row = figures.FigureRow(
        np.zeros((8, 8, 3), np.uint8), Explanation(np.ones(1, np.float32), 0, maps), "x" * 99
    )
    sheets = explain.Sheets(tmp_path, images, explain.Drawing())
    for _ in range(images):
        sheets.add(row)
    sheets.finish()
    assert sum(count for count, *_ in pages) == images
    assert all(width <= 15.2 and height <= 13.4 for _, width, height in pages)
    # no page is nearly empty
    assert min(count for count, *_ in pages) >= max(count for count, *_ in pages) / 3


def test_names_never_meet() -> None:
    paths = ["a/x.jpg", "b/x.jpg", "b/X.png", "c/b/x.png", "contact.jpg", "a/y.jpg", "a/y.png", "a/y.webp"]
    names = explain._file_names(map(Path, paths), taken=["contact"])
    folder = Path.cwd().name
    assert names == ["x", "b_x", "b_X-2", "b_x-3", f"{folder}_contact", "y", "a_y", "a_y-2"]


def test_bad_images_are_named_and_the_others_done(
    run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/robin/000.jpg").write_bytes(b"no image")
    Path("photos/zero.jpg").touch()
    assert main(["explain", run, "photos", "--output", "out"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "3 images: out/contact.jpg\n"
    first, second, last = shown.err.splitlines()
    assert first.startswith("crossx explain: photos/robin/000.jpg: ")
    assert second == "crossx explain: photos/zero.jpg: is empty (0 bytes)."
    assert last == "crossx explain: 2 of 5 images cannot be read."
    assert written() == ["001.png", "contact.jpg", "wren_000.png", "wren_001.png"]


def test_nothing_but_bad_images(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("no image")
    assert main(["explain", run, "text.txt", "--output", "out"]) == 1
    assert capsys.readouterr().out == ""
    assert written() == []


@pytest.mark.slow
def test_what_the_image_shows_is_the_evaluation_crop(
    run: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[figures.FigureRow] = []
    drawn = figures.draw
    monkeypatch.setattr(
        figures, "draw", lambda rows, **options: (seen.extend(rows), drawn(rows, **options))[1]
    )
    assert main(["explain", run, "photos/wren/000.jpg", "--output", "out"]) == 0
    transform = eval_transform(Predictor.load(run).spec.preprocessing)
    expected = transform(transform.read("photos/wren/000.jpg")).permute(1, 2, 0).numpy()
    assert np.array_equal(seen[0].image, expected)


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (1, ["nowhere", "photos"], "nowhere: no such run folder or checkpoint file."),
        (1, ["RUN", "nowhere"], "nowhere: no such file or folder."),
        (
            2,
            ["RUN", "photos", "--maps", "clas"],
            "--maps takes activation, class, both, not 'clas'. Did you mean 'class'?",
        ),
        (
            2,
            ["RUN", "photos", "--maps", "class", "--class", "wrenn"],
            "unknown class 'wrenn'. Did you mean 'wren'?",
        ),
        (
            2,
            ["RUN", "photos", "--class", "wren"],
            "--class needs class maps: give --maps class or --maps both.",
        ),
        (2, ["RUN", "photos", "--colormap", "viridi"], "unknown colormap 'viridi'. Did you mean 'viridis'?"),
        (2, ["RUN", "photos", "--opacity", "2"], "--opacity takes a number from 0 to 1, not '2'."),
        (2, ["RUN", "photos", "--opacity", "high"], "--opacity takes a number from 0 to 1, not 'high'"),
        (
            2,
            ["RUN", "photos", "--data.batch_size", "0"],
            "--data.batch_size takes a whole number of at least 1, not '0'",
        ),
        (2, ["RUN", "photos", "--device", "gpu"], "unknown device 'gpu'."),
        (
            2,
            ["RUN", "photos", "--output", "photos"],
            "photos: holds other files (robin). Choose a new or an empty",
        ),
        (
            2,
            ["RUN", "photos", "--output", "out.PNG"],
            "--output out.PNG: is the name of a picture. Give a folder",
        ),
        (1, ["RUN", "photos", "--output", "file/out"], "there is a file where a folder is needed."),
        (1, ["RUN", "photos", "--output", "file"], "there is a file where a folder is needed."),
        (1, ["RUN", "photos", "--output", "/proc/out"], "/proc/out: "),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    code: int, words: list[str], message: str, run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    words = [run if word == "RUN" else word for word in words]
    if "--output" not in words:
        words += ["--output", "out"]
    assert main(["explain", *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crossx explain: error: ")
    assert message in line
    assert line[-1] in ".?"
    assert not Path("out").exists() or written() == []
    assert not Path("out.PNG").exists()


def test_output_is_required(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", run, "photos"]) == 2
    assert "--output" in capsys.readouterr().err


def test_the_choices_are_those_of_the_room() -> None:
    assert get_args(Kind) == get_args(explain.Kind)
