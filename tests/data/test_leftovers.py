from __future__ import annotations

import pytest

from crossx.data.leftovers import is_leftover, is_system_path

LEFT_BEHIND = (
    *(
        "__MACOSX",
        "._1.jpg",
        ".DS_Store",
        ".AppleDouble",
        ".Spotlight-V100",
        "Icon\r",
        "Network Trash Folder",
    ),
    *(
        "Thumbs.db",
        "thumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "$RECYCLE.BIN",
        "System Volume Information",
    ),
    *("FOUND.000", "1.jpg:Zone.Identifier", "lost+found", ".Trash-1000", ".thumbnails", "1.lnk"),
    *(
        "@eaDir",
        "#recycle",
        "#snapshot",
        ".@__thumb",
        "@Recycle",
        ".nfs000012",
        ".smbdeleteAAA",
        ".fuse_hidden0001",
    ),
    *(
        ".sync",
        ".stfolder",
        ".dropbox.cache",
        "1.jpg.icloud",
        ".picasaoriginals",
        "Picasa.ini",
        "1.XMP",
        "1.aae",
        "1.THM",
    ),
    *(
        ".git",
        ".ipynb_checkpoints",
        "__pycache__",
        "1.jpg~",
        "1.jpg.tmp",
        "1.jpg.part",
        "1.jpg.crdownload",
        "~$birds.xlsx",
        "thumbnails",
        "_thumbs",
        "wandb",
        "lightning_logs",
        "1.sync-conflict-20230101-101010-ABCDEFG.jpg",
        "1 (Ann's conflicted copy 2023-01-01).jpg",
        "1_conflict-20230101-101010.jpg",
    ),
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_left_behind(name: str) -> None:
    assert is_leftover(name)


@pytest.mark.parametrize(
    "name",
    [
        "robin",
        "1.jpg",
        "trash",
        "recycled",
        "icon",
        "icons",
        "#1",
        "@home",
        "Thumbs",
        "Found",
        "git",
        "_hidden",
        "part",
        "conflict",
        "1_conflict.jpg",
    ],
)
def test_names_of_classes_and_images(name: str) -> None:
    assert not is_leftover(name)


def test_paths_in_tables() -> None:
    for path in (
        "__MACOSX/red/1.jpg",
        "red\\._1.jpg",
        "._1.jpg",
        "red/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
        "Thumbs.db",
    ):
        assert is_system_path(path), path
    for path in ("~", "red/1.jpg~", ".red/.1.jpg", "#recycle", "a__macosx/1.jpg"):
        assert not is_system_path(path), path
