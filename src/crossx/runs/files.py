"""Write files atomically, read JSON and YAML of a run, and report storage errors in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crossx.commands import command
from crossx.errors import CrossXError, UsageError
from crossx.text import read_text

MAX_TEXT = 64 << 20
"""Largest JSON file of a run that is read, in bytes."""

_OF_RUN = re.compile(
    r"config\.yaml|model\.(json|safetensors)|run\.json|metrics\.(csv|json)|exclude\.csv|images\.npy|neighbors\.npz|"
    r"profile\.json|checkpoints(/.*)?|tensorboard(/.*)?|\.lock|(train|val|test)(_parts|_against_.*)?\.json|"
    r"(train|val|test)(/(per_class|confusion|confused_pairs)\.csv|/(confusion|parts)\.png|/(predictions|examples)\.npz)?"
)
"""Files and folders that the verbs write into a run, relative to it; not the report, which takes --output."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary file in the same folder that replaces ``path`` if the block ends without an error.

    The data is flushed to disk first, so a kill or power cut leaves either the old file or the new one.

    Raises:
        CrossXError: If the disk is full or the folder not writable; the old file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # only now: a library may have replaced the file by its own, with other permissions
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
    except Exception as error:
        # safetensors has errors of its own
        if "No space left on device" not in str(error):
            raise
        raise storage_error(path, OSError(errno.ENOSPC, "")) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def file_checksum(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path) -> bool:
    """Whether the entries of an archive of ``torch.save`` or ``torch.export.save`` have the CRC-32 checksums in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:  # zipfile raises many kinds of errors for damaged files
        return False


def is_utf8(text: object) -> bool:
    """Whether a text, or a path, is valid UTF-8; the name of a file can be any bytes."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def user_path(path: str | Path) -> Path:
    """Return a path with the user's home in place of a leading ``~/`` or ``~NAME/``, unless there is such a path."""
    text = os.fspath(path)
    return Path(os.path.expanduser(text) if "/" in text and not os.path.lexists(text) else text)


def check_writable(folder: Path, file: Path | None = None, option: str = "--output") -> None:
    """Make a folder and check that it can be written to, before hours of work rather than after.

    Args:
        folder: The folder.
        file: What is to be written there, and ``option``: see ``storage_error``.
        option: The option that chooses it.

    Raises:
        CrossXError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # with the name of a leftover, where a file system gives temporary files one
        with tempfile.TemporaryFile(prefix=".", suffix=".tmp", dir=folder):
            pass
    except OSError as error:
        raise storage_error(folder, error, file, option) from error


def check_output_file(path: Path, option: str = "--output") -> None:
    """Check that a file can be written, which an option chooses.

    Raises:
        UsageError: If it is a folder.
        CrossXError: If its folder cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the name of a file.")
    check_writable(path.parent, path, option)


def storage_error(
    path: Path, error: OSError, file: Path | None = None, option: str = "--output"
) -> CrossXError:
    """Turn an ``OSError`` while writing ``path`` into one line that says what to do.

    Args:
        path: What could not be written.
        error: The error.
        file: What it was to hold, if that is not ``path``. A file of a run, such as its ``test.json``, is not chosen by
            an option.
        option: The option that chooses any other file.
    """
    own = _is_of_run(file or path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CrossXError(
            f"{path}: no space left on the disk. What was written before is intact: free some room."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "Copy the run to a folder of your own." if own else f"Choose another {option}."
        return CrossXError(f"{path}: no permission to write there. {remedy}")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        remedy = "Move it away." if own else f"Choose another {option}."
        return CrossXError(f"{path}: there is a file where a folder is needed. {remedy}")
    return CrossXError(f"{path}: cannot be written ({error.strerror or error}).")


def _is_of_run(path: Path) -> bool:
    """Say whether a path is one of those that a run writes in its folder."""
    return any(
        _OF_RUN.fullmatch(path.relative_to(folder).as_posix()) and os.path.isfile(folder / "model.json")
        for folder in path.parents[:2]
    )


def check_files(*paths: Path) -> None:
    """Refuse folders in the place of files of a run.

    Raises:
        CrossXError: If one is a folder.
    """
    for path in paths:
        if path.is_dir():
            raise CrossXError(f"{path}: a folder where the run has a file. Move it away.")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; file names in it that are not valid UTF-8 are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text if is_utf8(text) else _escaped(text), encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given; NaN and infinity are refused."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    if not is_utf8(text):
        text = json.dumps(_escaped(values), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CrossXError: If the file is missing, unreadable or holds something else.
    """
    return parse_json(read_text(path, MAX_TEXT), path)


def parse_json(text: str, source: Path) -> dict[str, Any]:
    """Read a JSON object from text; ``source`` is named in errors.

    Raises:
        CrossXError: If the text is something else.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError as error:
        raise CrossXError(f"{source}: not a JSON object: its values are nested too deeply.") from error
    # among them numbers with thousands of digits
    except ValueError as error:
        raise CrossXError(f"{source}: not valid JSON ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise CrossXError(f"{source}: not a JSON object.")
    return values


def read_results(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Read the results that ``crossx test`` wrote.

    Args:
        path: ``RUN/SPLIT.json``.
        needed: Required keys; ``a.b`` is a key within ``a``.

    Raises:
        CrossXError: If the file is missing, lacks a required key, or holds something else.
    """
    from crossx.schema.run import ResultsFile, check_file, require

    try:
        results = read_json(path)
        check_file(ResultsFile, results, path)
    except CrossXError as error:
        again = command("test", path.parent, "--split", path.stem)
        raise CrossXError(f"{error} Write it again with `{again}`.") from error
    require(results, needed, path)
    return results


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a training history, ``metrics.json``: one row per epoch.

    Raises:
        CrossXError: If the file is missing or holds something else.
    """
    from crossx.schema.run import HistoryFile, check_file

    values = read_json(path)
    check_file(HistoryFile, values, path)
    rows: list[dict[str, Any]] = values["epochs"]
    return rows


def read_config(path: Path) -> dict[str, Any]:
    """Read a training configuration, ``config.yaml``.

    Raises:
        CrossXError: If the file is missing, unreadable or not a YAML mapping.
    """
    # slow to import
    from crossx.yaml import load_yaml, read_yaml

    try:
        values = load_yaml(read_yaml(path), str(path))
    except UsageError as error:
        raise CrossXError(str(error)) from error
    if not isinstance(values, dict):
        raise CrossXError(f"{path}: not a configuration (a mapping with model, data, optim, trainer).")
    return values


def _escaped(value: Any) -> Any:
    """Write the bytes of file names that are not valid UTF-8 as escapes."""
    if isinstance(value, str):
        return os.fsencode(value).decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
