"""A registry for each test, and a working folder with a method of one's own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_files import OWN, Forget

import layouts
from crossx import plugins
from crossx.methods import registry


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Forget]:
    """Give each test a registry and a list of trusted files of its own; the function makes this a new process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    own = {name: cls for name, cls in registry._REGISTRY.items() if cls.__module__.startswith("crossx.")}
    modules = {*sys.modules}

    def forget() -> None:
        for name, values in (("_REGISTRY", own), ("_IMPORTED", {}), ("_LOADED", {})):
            monkeypatch.setattr(registry, name, dict(values))
        for name in {*sys.modules} - modules:
            if name.startswith(("crossx_import_", "own_")):
                del sys.modules[name]
        plugins._offers.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``mine.py`` and six photos of two classes."""
    monkeypatch.chdir(tmp_path)
    layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=3)
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path
