"""What verbs check and say before torch is imported and after a training."""

import os
from pathlib import Path

import pytest

from crossx.cli.options import check_folder, next_command
from crossx.errors import CrossXError
from crossx.runs import Run, write_json


@pytest.mark.parametrize("path", ["new", "new/deeper", "there", "there/new", "."])
def test_a_folder_that_can_be_made_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    check_folder(path)
    assert os.listdir() == ["there"]


def test_files_links_to_nowhere_and_missing_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path in ("file", "file/deeper", "link", "link/deeper"):
        with pytest.raises(CrossXError, match="there is a file where a folder is needed"):
            check_folder(tmp_path / path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for path in ("", "new", "new/deeper"):
        with pytest.raises(CrossXError, match="no permission to write there"):
            check_folder(tmp_path / path)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"images": {"train": 3, "val": 0, "test": 2}}, "crossx test '{}'"),
        ({"images": {"train": 3, "val": 0, "test": 0}}, "crossx predict '{}' IMAGES"),
        ({}, "crossx test '{}'"),
    ],
)
def test_a_run_without_test_images_is_not_tested_next(
    tmp_path: Path, info: dict[str, object], expected: str
) -> None:
    run = Run(tmp_path / "a run")
    write_json(run.info, info)
    assert next_command(run) == expected.format(run.path)
