import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import layouts
from crossx.cli import report
from crossx.cli.main import main
from crossx.errors import CrossXError
from crossx.evaluation.run import WRITTEN
from crossx.report.examples import Similar, similar_tiles

QUICK = ["--device", "cpu", "--data.num_workers", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ``images``, a run on them, and the run once it was tested (``tested``)."""
    place = tmp_path_factory.mktemp("report")
    layouts.write_folder(place / "images", split_folders=True)
    layouts.write_run(place / "run", sorted(layouts.FOLDERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree("run", "tested")
        assert main(["test", "tested", "--data.root", "images", *QUICK]) == 0
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("images", "run", "tested"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_tested_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run", "--data.root", "images", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("crossx (test_resnet) on folder images, test: 6 images")
    assert lines[-1].startswith("report: run/test/report.html (")
    page = Path("run/test/report.html").read_text(encoding="utf-8")
    # 6 images with 2 parts on 3 stages, each in its section and in at most one pair for each role
    assert page.count("data:image/webp") >= 6 * 7
    assert "robin/" in page


@pytest.mark.parametrize("output", [[], ["--output", "page.html"]])
def test_a_run_that_must_be_tested_and_cannot_be_written_to_is_to_be_copied(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: list[str]
) -> None:
    """Another --output would not help."""
    monkeypatch.setattr(report, "test_run", lambda *_, **__: pytest.fail("tested"))
    opened = tempfile.TemporaryFile

    def refused(*, dir: Path, **options: Any) -> Any:
        if Path("run") in (dir, *dir.parents):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert main(["report", "run", "--data.root", "images", *output, *QUICK]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    expected = "run: no permission to write there. Copy the run to a folder of your own."
    assert line == f"crossx report: error: {expected}"


@pytest.mark.parametrize(
    ("file", "damage", "remedy"),
    [
        *(
            ("metrics.json", damage, "Move it away for a page without the curves of the training.")
            for damage in ("", "[]", '{"epochs": 3}', '{"epochs": [{"epoch": "one"}]}')
        ),
        ("test_parts.json", "{", "`crossx test run --parts --split test` writes it again."),
        ("test_parts.json", "[]", "`crossx test run --parts --split test` writes it again."),
        ("test.json", "{", "Write it again with `crossx test run --split test`."),
        ("test.json", '{"top1": "high"}', "Write it again with `crossx test run --split test`."),
    ],
)
def test_what_a_page_needs_is_read_before_the_test(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    damage: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(report, "test_run", lambda *_, **__: pytest.fail("tested"))
    Path("run", file).write_text(damage)
    assert main(["report", "run", *QUICK]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"crossx report: error: run/{file}: not ")
    assert line.endswith(remedy)


@pytest.mark.parametrize("words", [[], ["--parts"]])
def test_a_folder_in_the_place_of_the_results_is_found_before_the_test(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("crossx.data.datamodule.DataModule.check_images", lambda *_: pytest.fail("read"))
    for name in ("test.json", "test_parts.json"):
        Path("run", name).mkdir()
    assert main(["test", "run", *words, "--data.root", "images", *QUICK]) == 1
    name = "test_parts.json" if words else "test.json"
    assert f"run/{name}: a folder where a file is to be written. Move it away." in capsys.readouterr().err


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_in_the_place_of_a_table_is_found_before_the_test(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # what a test writes is what is checked
    assert {path.name for path in Path("tested/test").iterdir()} == {*WRITTEN}
    monkeypatch.setattr("crossx.data.datamodule.DataModule.check_images", lambda *_: pytest.fail("read"))
    Path("run/test", name).mkdir(parents=True)
    assert main(["test", "run", "--data.root", "images", *QUICK]) == 1
    assert (
        f"run/test/{name}: a folder where a file is to be written. Move it away." in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_page_says_what_the_boxes_on_its_images_are(place: Path) -> None:
    layouts.write_run(place / "nts", sorted(layouts.FOLDERS), method="nts")
    said = "The numbered boxes are the regions"
    for run, count in (("nts", 1), ("run", 0)):
        assert main(["report", run, "--data.root", "images", *QUICK]) == 0
        page = Path(run, "test", "report.html").read_text(encoding="utf-8")
        assert page.count(said) == count
    assert "only head <i>joined</i>" in Path("nts/test/report.html").read_text(encoding="utf-8")


def test_a_tested_run_is_not_tested_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("tested/test.json").stat().st_mtime_ns
    assert main(["report", "tested", "--output", "pages/mine.html", *QUICK]) == 0
    assert capsys.readouterr().out.startswith("report: pages/mine.html (")
    assert Path("tested/test.json").stat().st_mtime_ns == before


def test_another_split_has_a_page_of_its_own(place: Path) -> None:
    assert main(["report", "run", "--split", "val", "--data.root", "images", *QUICK]) == 0
    assert "6 val images" in Path("run/val/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_page_without_the_network_is_that_with_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("tested/checkpoints", ignore_errors=True)
    weights, maps, page = (
        Path("tested", name) for name in ("model.safetensors", "test/examples.npz", "page.html")
    )
    kept, modified = weights.read_bytes(), weights.stat().st_mtime_ns
    weights.write_bytes(b"damaged")
    os.utime(weights, ns=(modified, modified))
    assert main(["report", "tested", "--output", str(page), *QUICK]) == 0
    assert "warning" not in capsys.readouterr().err
    without = page.read_text(encoding="utf-8")
    weights.write_bytes(kept)
    os.utime(weights, ns=(modified, modified))
    maps.unlink()
    assert main(["report", "tested", "--output", str(page), *QUICK]) == 0
    assert page.read_text(encoding="utf-8") == without


def test_a_report_imports_no_torch(place: Path) -> None:
    code = "import sys; from crossx.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "tested"], capture_output=True, text=True, check=True
    )
    page, imported = done.stdout.splitlines()
    assert page.startswith("report: tested/test/report.html (")
    assert not {"torch", "timm", "torchvision", "torchmetrics", "lightning", "pyarrow"} & {*imported.split()}
    assert "data:image/webp" in Path("tested/test/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("lost", ["images", "images/test/robin/003.jpg"])
def test_lost_images_leave_a_page_without_pictures(
    place: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    path = Path(lost)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert main(["report", "tested", *QUICK]) == 0
    assert "the page has no pictures: " in capsys.readouterr().err
    page = Path("tested/test/report.html").read_text(encoding="utf-8")
    assert "The page has no pictures: " in page
    assert "data:image" not in page


def test_replaced_images_leave_a_page_without_pictures_until_they_are_tested(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (place / f"images/test/{name}" for name in ("robin/003.jpg", "wren/003.jpg"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert main(["report", "tested", *QUICK]) == 0
    said = "is another image than the one that was tested: test again with `crossx test tested --split test`."
    assert f"the page has no pictures: test/robin/003.jpg in images {said}" in " ".join(
        capsys.readouterr().err.split()
    )
    page = Path("tested/test/report.html").read_text(encoding="utf-8")
    assert "is another image than the one that was tested" in page
    assert "data:image" not in page
    assert main(["test", "tested", "--data.root", "images", *QUICK]) == 0
    assert main(["report", "tested", *QUICK]) == 0
    page = Path("tested/test/report.html").read_text(encoding="utf-8")
    assert "The page has no pictures" not in page
    assert "data:image/webp" in page


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (1, ["nowhere"], "nowhere: no such run folder or checkpoint file."),
        (1, ["images"], "images: not a run folder (no model.json)."),
        (2, ["tested", "--split", "tset"], "unknown split 'tset'. Did you mean 'test'?"),
        (2, ["tested", "--output", "page.pdf"], "page.pdf: the report is an HTML page"),
        (2, ["tested", "--output", "folder.html"], "folder.html is a folder"),
        (1, ["tested", "--output", "file/page.html"], "there is a file where a folder is needed"),
        (1, ["run", "--data.root", "gone"], "gone: no such folder"),
        (2, ["run", "--outptu", "a.html"], "unknown option '--outptu'. Did you mean '--output'?"),
    ],
)
def test_wrong_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], code: int, words: list[str], message: str
) -> None:
    Path("folder.html").mkdir()
    Path("file").touch()
    assert main(["report", *words]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("crossx report: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not list(place.rglob("report.html"))


def test_the_page_shows_training_images_that_are_most_similar_to_mistakes(place: Path) -> None:
    root = str(place / "images")
    Path("tested/run.json").write_text(json.dumps({"data_root": root, "data": {"dataset": "folder"}}))
    for count in (0, 3):
        assert main(["report", "tested", "--neighbors", str(count), *QUICK]) == 0
        page = Path("tested/test/report.html").read_text(encoding="utf-8")
        mistakes = page.count("it is most like these training images")
        assert (mistakes > 0) == (count > 0)
        assert page.count("Training image of ") == 3 * mistakes


def test_similar_training_images_have_names_that_people_read(place: Path) -> None:
    shown = similar_tiles([Similar("012.Blue_Jay", 0.5, None)], {"012.Blue_Jay": "Blue Jay"})
    assert shown == [("Blue Jay", 0.5, None)]


def test_a_page_without_training_images_has_pictures(place: Path) -> None:
    for name in ("run.json", "neighbors.npz"):
        Path("tested", name).unlink(missing_ok=True)
    assert main(["report", "tested", "--neighbors", "3", *QUICK]) == 0
    page = Path("tested/test/report.html").read_text(encoding="utf-8")
    assert "The page has no similar training images: " in page
    assert "The page has no pictures" not in page
    assert "data:image/webp" in page


def test_the_paths_of_an_index_without_its_images_are_not_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise CrossXError("the training images are gone")

    run = {"data_root": str(place / "images"), "data": {"dataset": "folder"}}
    Path("tested/run.json").write_text(json.dumps(run))
    assert main(["report", "tested", "--neighbors", "3", *QUICK]) == 0
    monkeypatch.setattr("crossx.predict.neighbors._training_images", fail)
    assert main(["report", "tested", "--neighbors", "3", *QUICK]) == 0
    page = Path("tested/test/report.html").read_text(encoding="utf-8")
    assert "it is most like these training images" in page
    assert "Training image of " not in page
