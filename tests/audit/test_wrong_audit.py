"""What an audit refuses, before any work."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("cleanlab")
pytest.importorskip("cleanvision")

import crossx
from crossx.audit.run import audit_dataset
from crossx.errors import CrossXError, UsageError


def test_wrong_options_are_refused(photographs: Path, backbone: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown reason 'blurry'"):
        audit_dataset("folder", photographs, exclude=["blurry"])
    with pytest.raises(UsageError, match=r"unknown check 'label'.*Did you mean 'labels'"):
        audit_dataset("folder", photographs, checks=["label"])
    with pytest.raises(UsageError, match="--backbone and --run cannot be combined"):
        audit_dataset("folder", photographs, backbone=backbone, run="runs/mine")
    with pytest.raises(UsageError, match="is in the dataset's folder"):
        audit_dataset("folder", photographs, output=photographs / "audit", backbone=backbone)
    with pytest.raises(CrossXError, match="no such run folder"):
        audit_dataset("folder", photographs, run=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"there is no /nowhere/config\.json"):
        audit_dataset("folder", photographs, backbone="local-dir:/nowhere")


def test_without_a_readable_image_the_error_names_one(backbone: str, tmp_path: Path) -> None:
    for name in ("robin", "wren"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        (tmp_path / "data/train" / name / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(CrossXError, match=r"none of 2 images can be read \(train/robin/a.jpg: "):
        audit_dataset("folder", tmp_path / "data", backbone=backbone)


def test_a_missing_library_is_named(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(UsageError, match=r"needs cleanlab: pip install 'crossx\[audit\]'"):
        crossx.audit_dataset("folder", photographs)
