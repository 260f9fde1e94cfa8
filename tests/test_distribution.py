"""What a built distribution says about the project."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/someone/crossx"
README = (
    "[docs](docs/data.md) ![a bird](docs/bird.jpg) [top](#top) [paper](https://arxiv.org/abs/1) [all](docs/)"
)
VARIABLES = ("CROSSX_REPOSITORY", "GITHUB_REPOSITORY", "GITHUB_SERVER_URL")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("hatchling", reason="needs crossx[dev]")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return load(ROOT / "hatch_build.py")


def test_relative_links_become_absolute(build: ModuleType) -> None:
    assert build.absolute_links(README, REPOSITORY, "v1.2.3") == (
        f"[docs]({REPOSITORY}/blob/v1.2.3/docs/data.md) ![a bird]({REPOSITORY}/raw/v1.2.3/docs/bird.jpg) [top](#top) "
        f"[paper](https://arxiv.org/abs/1) [all]({REPOSITORY}/tree/v1.2.3/docs/)"
    )
    assert (
        build.absolute_links(README, None, "v1") == "docs  [top](#top) [paper](https://arxiv.org/abs/1) all"
    )


def test_the_repository_is_that_which_builds(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.find_repository(tmp_path) is None
    (tmp_path / "PKG-INFO").write_text(
        f"Name: crossx\nProject-URL: Paper, https://a.b/c\nProject-URL: Repository, {REPOSITORY}\n\ntext\n"
    )
    assert build.find_repository(tmp_path) == REPOSITORY
    monkeypatch.setenv("GITHUB_REPOSITORY", "fork/crossx")
    assert build.find_repository(tmp_path) == "https://github.com/fork/crossx"
    monkeypatch.setenv("CROSSX_REPOSITORY", f"{REPOSITORY}/")
    assert build.find_repository(tmp_path) == REPOSITORY
    monkeypatch.setenv("CROSSX_REPOSITORY", "git@github.com:someone/crossx")
    with pytest.raises(ValueError, match="is not the https URL of a repository"):
        build.find_repository(tmp_path)
    assert {"Repository", "Issues", "Changelog", "Documentation", "Paper"} == build.urls(REPOSITORY).keys()


@pytest.mark.slow
def test_a_wheel_has_urls_and_a_description(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSX_REPOSITORY", REPOSITORY)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("crossx-*.whl")
    check = load(ROOT / ".ci" / "check_dist.py")
    metadata = check.read_metadata(wheel)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert check.wrong_metadata(metadata, citation, f"v{metadata['Version']}") == []
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"Repository, {REPOSITORY}" in metadata.get_all("Project-URL")
    assert f"]({REPOSITORY}/blob/v{metadata['Version']}/docs/training.md)" in metadata.get_payload()
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())


def test_contradictions_of_a_distribution_are_named() -> None:
    check = load(ROOT / ".ci" / "check_dist.py")
    metadata = Message()
    metadata["Version"] = "0.2.0"
    metadata.set_payload("[docs](docs/data.md) [paper](https://arxiv.org/abs/1)")
    assert check.wrong_metadata(metadata, "title: crossx\nversion: 0.2.0\n") == [
        "the long description has the relative link docs/data.md"
    ]
    wrong = check.wrong_metadata(metadata, "title: crossx\nversion: 0.1.0\n", "v0.3.0")
    assert wrong[:3] == [
        "CITATION.cff has another version than 0.2.0",
        "the tag v0.3.0 is not v0.2.0, the version of pyproject.toml",
        "the URL of the repository is not known: set CROSSX_REPOSITORY",
    ]


def test_the_version_is_written_in_pyproject_and_quoted_in_citation() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
