from pathlib import Path

import pytest

import layouts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where images are unpacked, of a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "crossx" / "embedded"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve images of two classes in turns."""
    paths = [tmp_path_factory.mktemp("images") / f"{number}.jpg" for number in range(12)]
    for number, path in enumerate(paths):
        layouts.write_image(path, number % 2, number)
    return paths


@pytest.fixture(scope="session")
def images(photos: list[Path]) -> list[bytes]:
    """Their encoded bytes."""
    return [path.read_bytes() for path in photos]
