import os
import pwd
import tempfile
from pathlib import Path

import pytest

from crossx.caches import cache_folder, prepare_caches

VARIABLES = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR", "USER")
VARIABLES += ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user in an own folder of temporary files, with no variable set."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for variable in VARIABLES:
        # setenv first, so that what the code sets is undone
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return folder / f"crossx-{os.getuid()}"


def test_a_home_that_can_be_written_to_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare_caches() is None
    assert cache_folder() == tmp_path / "home/.cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert prepare_caches() is None
    assert cache_folder() == tmp_path / "other"
    assert "HF_HOME" not in os.environ


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HOME", "/proc/nothing"),
        ("HOME", "/dev/null"),
        ("XDG_CACHE_HOME", "/proc/nothing/cache"),
        ("XDG_CACHE_HOME", "/dev/null"),
    ],
)
def test_a_home_that_cannot_be_written_to_is_replaced(
    variable: str, value: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert cache_folder() == temporary
    note = prepare_caches()
    assert note is not None
    assert note.endswith(
        f"cannot be written to: caches are in {temporary}. XDG_CACHE_HOME sets another folder."
    )
    assert os.environ["XDG_CACHE_HOME"] == str(temporary)
    assert os.environ["MPLCONFIGDIR"] == f"{temporary}/matplotlib"
    assert temporary.stat().st_mode & 0o77 == 0
    assert prepare_caches() is None


def test_a_user_without_an_entry_and_without_a_home(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    note = prepare_caches()
    assert note is not None
    assert note.startswith(f"there is no home folder: caches are in {temporary}.")
    assert os.path.expanduser("~") == str(temporary)
    assert os.environ["USER"] == str(os.getuid())


def test_what_was_downloaded_to_a_home_that_is_read_only_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / ".cache"))
    assert prepare_caches() is not None
    assert os.environ["HF_HOME"] == str(tmp_path / ".cache/huggingface")
    assert "TORCH_HOME" not in os.environ


def test_a_folder_that_somebody_else_has_made_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary.parent / "theirs").mkdir()
    temporary.symlink_to(temporary.parent / "theirs")
    monkeypatch.setenv("HOME", "/dev/null")
    folder = cache_folder()
    assert folder not in (temporary, temporary.parent / "theirs")
    assert folder.parent == temporary.parent
