from pathlib import Path

import pytest

import layouts
from crossx.data.catalog import read_configured
from crossx.data.config import DataConfig
from crossx.data.exclude import read_excluded, write_excluded, written_path
from crossx.errors import CrossXError
from crossx.runs.spreadsheet import escape_formula


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_folder(tmp_path_factory.mktemp("images"), classes=3, images_per_class=10)


def config_of(root: Path, file: Path | None = None) -> DataConfig:
    exclude = None if file is None else str(file)
    return DataConfig(root=str(root), val_fraction=0.2, test_fraction=0.2, exclude=exclude)


def write(path: Path, *names: str, header: str = "path") -> Path:
    layouts.write_lines(path, [header, *names])
    return path


@pytest.mark.parametrize(
    "spelling",
    ["robin/001.jpg", "./robin/001.jpg", "robin\\001.jpg", "{root}/robin/001.jpg", "'robin/001.jpg'"],
)
def test_listed_images_are_left_out_and_the_others_keep_their_split(
    root: Path, tmp_path: Path, spelling: str
) -> None:
    quote = spelling.startswith("'")
    file = write(tmp_path / "out.csv", spelling.format(root=root).replace("'", '"' * quote), "wren/004.jpg")
    before = read_configured(config_of(root)).with_validation(0.2, 0)
    after = read_configured(config_of(root, file)).with_validation(0.2, 0)
    gone = {root / "robin/001.jpg", root / "wren/004.jpg"}
    assert {record.path for record in after.excluded} == gone
    assert after.records == tuple(record for record in before.records if record.path not in gone)
    assert any("2 images" in note and str(file) in note for note in after.notes)


def test_paths_of_a_table_are_relative_to_its_folder(tmp_path: Path) -> None:
    table = layouts.write_table(tmp_path / "data", splits=True)
    file = write(tmp_path / "out.csv", "images/0_000.jpg")
    index = read_configured(DataConfig(dataset="table", root=str(table), exclude=str(file)))
    assert [record.path for record in index.excluded] == [table.parent / "images/0_000.jpg"]


def test_an_unknown_path_is_refused_with_its_line_and_the_nearest(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "out.csv", "robin/001.jpg", "robin/01.jpg", "elsewhere.jpg")
    with pytest.raises(
        CrossXError, match=r"line 3: 'robin/01.jpg' is not an image .*2 of 3 .*Did you mean 'robin/0"
    ):
        read_configured(config_of(root, file))
    index = read_configured(config_of(root, file), other_images=True)
    assert [record.path.name for record in index.excluded] == ["001.jpg"]


def test_a_class_without_training_images_is_refused(root: Path, tmp_path: Path) -> None:
    names = [f"wren/{number:03d}.jpg" for number in range(10)]
    with pytest.raises(CrossXError, match="leaves 1 class without training images: 'wren'"):
        read_configured(config_of(root, write(tmp_path / "out.csv", *names)))


def test_a_class_without_test_images_is_a_note(root: Path, tmp_path: Path) -> None:
    held_out = [record for record in read_configured(config_of(root)).split("test") if record.label == 1]
    file = tmp_path / "out.csv"
    write_excluded(file, [(written_path(record.path, root),) for record in held_out])
    index = read_configured(config_of(root, file))
    assert any("leaves 1 class without test images" in note for note in index.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file. --data.exclude takes a table"),
        ("file,reason\na.jpg,dark\n", "no column 'path'"),
        ("", "no column 'path'"),
    ],
)
def test_a_file_without_paths_is_refused(
    root: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "out.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(CrossXError, match=message):
        read_configured(config_of(root, file))


def test_a_file_that_lists_nothing_leaves_nothing_out(root: Path, tmp_path: Path) -> None:
    index = read_configured(config_of(root, write(tmp_path / "out.csv", header="path,reason,detail")))
    assert index.excluded == ()
    assert any("0 images left out" in note for note in index.notes)


@pytest.mark.parametrize("name", ["=cmd.jpg", "caf\udce9.jpg", "a,b.jpg", 'say "x".jpg', "naïve.jpg"])
def test_every_name_survives_writing_and_reading(tmp_path: Path, name: str) -> None:
    root = layouts.write_folder(tmp_path / "images", classes=2, images_per_class=3)
    odd = root / "robin" / name
    try:
        (root / "robin/000.jpg").rename(odd)
    except OSError:
        pytest.skip("the file system does not take this name")
    file = tmp_path / "out.csv"
    write_excluded(file, [(written_path(odd, root), "dark")], ("path", "reason"))
    index = read_configured(DataConfig(root=str(root), test_fraction=0, exclude=str(file)))
    assert [record.path for record in index.excluded] == [odd]


def test_formulas_are_escaped_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    write_excluded(file, [("=1+1.jpg",)])
    assert read_excluded(file) == [("line 2", escape_formula("=1+1.jpg"))]
