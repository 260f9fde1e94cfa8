"""Find image files."""

import os
from pathlib import Path

import pytest

from crossx.data.image_files import find_images, require_images
from crossx.errors import CrossXError
from refusals import refusal


def test_find_images(tmp_path: Path) -> None:
    wanted = ["a/1.jpg", "a/B.PNG", "a/deep/er/x.tiff", "b/phone.heic"]
    for name in [*wanted, "a/notes.txt", "a/.hidden.jpg", ".cache/y.jpg", "a/noext"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert find_images(tmp_path) == [tmp_path / name for name in wanted]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    for name in ("root/a/1.jpg", "root/b/2.jpg", "elsewhere/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    a = tmp_path / "root/a"
    (a / "up").symlink_to("..")
    (a / "further").symlink_to(tmp_path)
    (a / "other").symlink_to(tmp_path / "elsewhere")
    assert find_images(a) == [a / "1.jpg", a / "other/3.jpg"]
    assert find_images(Path(os.path.relpath(a))) == [
        Path(os.path.relpath(a)) / "1.jpg",
        Path(os.path.relpath(a)) / "other/3.jpg",
    ]
    linked = tmp_path / "linked"
    linked.symlink_to(a)
    assert find_images(linked) == [linked / "1.jpg", linked / "other/3.jpg"]


def test_a_folder_of_raw_files_says_so(tmp_path: Path) -> None:
    assert refusal(require_images, tmp_path) == f"{tmp_path}: there is no image in this folder or below it."
    (tmp_path / "day").mkdir()
    for name in ("a.CR2", "day/b.dng", "day/c.txt"):
        (tmp_path / name).touch()
    assert refusal(require_images, tmp_path) == (
        f"{tmp_path}: there is no image in this folder or below it, but 2 images that are not read (.cr2, .dng): "
        "convert to JPEG or PNG."
    )


def test_raw_files_among_images_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "b.NEF", "c.jpg", "c.NEF"):
        (tmp_path / name).touch()
    assert require_images(tmp_path) == [tmp_path / "a.jpg", tmp_path / "c.jpg"]
    assert caplog.messages == []
    require_images(tmp_path, note=True)
    assert caplog.messages == [f"{tmp_path}: 1 image that is not read (.nef): convert to JPEG or PNG."]


def test_find_images_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CrossXError, match="cannot be listed"):
        find_images(tmp_path / "missing")
