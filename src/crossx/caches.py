"""Where downloads and decoded images are kept, also without a home that can be written to. Imports no torch."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME`` or ``~/.cache``, or a temporary folder where that cannot be written to."""
    wanted = _wanted_folder()
    return wanted if wanted is not None and _is_writable(wanted) else _temporary_folder()


def prepare_caches() -> str | None:
    """Lead all libraries to a cache that can be written to; return a note if it is a temporary one.

    Sets environment variables, which the libraries read when they are imported. What was downloaded to a home that
    cannot be written to is still found.
    """
    _name_user()
    wanted = _wanted_folder()
    if wanted is not None and _is_writable(wanted):
        return None
    folder = _temporary_folder()
    for variable, name in (("HF_HOME", "huggingface"), ("TORCH_HOME", "torch")):
        if wanted is not None and (wanted / name).is_dir():
            os.environ.setdefault(variable, str(wanted / name))
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torchinductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if wanted is None:
        os.environ["HOME"] = str(folder)
    reason = "there is no home folder" if wanted is None else f"{wanted} cannot be written to"
    return f"{reason}: caches are in {folder}. XDG_CACHE_HOME sets another folder."


def _wanted_folder() -> Path | None:
    given = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # unlike Path.expanduser, it fails for nobody
    path = os.path.expanduser(given)
    return None if path.startswith("~") else Path(path)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    """Return this user's folder below the temporary one, or a new folder if somebody else has taken its name."""
    folder = Path(tempfile.gettempdir()) / f"crossx-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_symlink() and folder.stat().st_uid == os.getuid() and _is_writable(folder):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="crossx-"))


def _name_user() -> None:
    """Give ``getpass.getuser``, which libraries call for the name of a folder, an answer for an unknown user id."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", str(os.getuid()))
