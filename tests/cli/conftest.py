"""A run and images, as the verbs find them."""

from pathlib import Path

import pytest

import layouts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(layouts.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; ``photos`` in it holds six images of two classes."""
    monkeypatch.chdir(tmp_path)
    layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=3)
    return tmp_path
