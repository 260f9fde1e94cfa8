"""Methods of other packages and files: where they are, and which code may be imported for a run. Imports no torch.

A package offers methods as entry points of the group ``crossx.methods``. Any other file or module is imported only if
the user names it (``--import``, ``CROSSX_IMPORT``), or for a run that names it with the content that this user has
named before, as a list outside of all runs says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from crossx.commands import quoted
from crossx.errors import CrossXError, UsageError, first_line
from crossx.text import read_bytes

GROUP = "crossx.methods"
"""The group of the entry points: ``name = "package.module:Class"``."""
VARIABLE = "CROSSX_IMPORT"
"""Environment variable with the files and modules to import, separated as in ``PATH``; child processes inherit it."""
MAX_SOURCE = 16 << 20
MAX_LIST = 16 << 20
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Offer:
    """A method that an installed package offers.

    Attributes:
        package: The package's name and version.
        entry: What is loaded.
    """

    package: tuple[str, str]
    entry: metadata.EntryPoint

    def __str__(self) -> str:
        return f"package {self.package[0]}"


def offers() -> Mapping[str, list[Offer]]:
    """Return method name -> the installed packages that offer it; nothing of them is imported."""
    return _offers(tuple(sys.path))


@cache
def _offers(path: tuple[str, ...]) -> Mapping[str, list[Offer]]:
    found: dict[str, list[Offer]] = {}
    for package in metadata.distributions():
        # whatever is wrong with one package's files, the others are found
        with suppress(Exception):
            for entry in package.entry_points:
                if entry.group == GROUP:
                    known = found.setdefault(entry.name, [])
                    offer = Offer((package.metadata["Name"], package.version), entry)
                    # a package in two folders of the path is found twice; Python imports the first
                    if offer.package[0] not in (other.package[0] for other in known):
                        known.append(offer)
    return {name: known for name, known in sorted(found.items()) if known}


@dataclass(frozen=True)
class Source:
    """A file or module to import.

    Attributes:
        module: The module's name; empty for a file.
        path: The file, absolute.
        sha256: Digest of its content.
    """

    module: str
    path: Path
    sha256: str

    @classmethod
    def find(cls, word: str) -> Source:
        """Find what ``--import`` names: a file that ends in ``.py``, else a module on Python's path.

        Nothing is imported by it.

        Raises:
            UsageError: If there is no such file or module, or it has no source.
        """
        if not word:
            raise UsageError("--import: the value is empty: give a file or a module.")
        if word.endswith(".py") or "/" in word or os.path.isdir(word):
            path = Path(os.path.abspath(word))
            if path.is_dir():
                raise UsageError(
                    f"--import {word}: a folder. Give the file that registers the method; a package is given by its "
                    "name once it is installed."
                )
            if path.suffix != ".py":
                raise UsageError(f"--import {word}: a file of Python ends in .py.")
            return cls("", path, digest(path))
        if not _MODULE.fullmatch(word):
            raise UsageError(f"--import {word}: neither a file that ends in .py nor the name of a module.")
        path = find_module(word)
        return cls(word, path, digest(path))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Source:
        """Rebuild from ``to_json``."""
        return cls(values["module"], Path(values["path"]), values["sha256"])

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for ``run.json``."""
        return {"module": self.module, "path": str(self.path), "sha256": self.sha256}

    @property
    def word(self) -> str:
        """What ``--import`` is given."""
        return self.module or str(self.path)

    @property
    def key(self) -> str:
        """Name of the imported module in ``sys.modules``."""
        if self.module:
            return self.module
        stem = re.sub(r"\W", "_", self.path.stem)
        return f"crossx_import_{stem}_{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]}"

    def execute(self) -> ModuleType:
        """Import it.

        Raises:
            CrossXError: If its content is not that of ``sha256``, or its code fails.
        """
        if self.module:
            if digest(find_module(self.module)) != self.sha256:
                raise CrossXError(f"{self.path}: has just been changed.")
            return importlib.import_module(self.module)
        content = read_bytes(self.path, MAX_SOURCE)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise CrossXError(f"{self.path}: has just been changed.")
        code: CodeType = compile(content, str(self.path), "exec", dont_inherit=True)
        module = ModuleType(self.key)
        module.__file__ = str(self.path)
        sys.modules[self.key] = module
        exec(code, module.__dict__)
        return module


def digest(path: Path) -> str:
    """Return the SHA-256 of a source file.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        return hashlib.sha256(read_bytes(path, MAX_SOURCE)).hexdigest()
    except CrossXError as error:
        raise UsageError(f"--import {error}") from error


def find_module(name: str) -> Path:
    """Return the source file of a module, without importing it or the packages around it.

    Raises:
        UsageError: If there is none.
    """
    spec: ModuleSpec | None = None
    path: Iterable[str] | None = None
    parts = name.split(".")
    for number in range(len(parts)):
        spec = _find_spec(".".join(parts[: number + 1]), path)
        if spec is None:
            break
        path = spec.submodule_search_locations or ()
    if spec is None:
        raise UsageError(f"--import {name}: no such module on Python's path; a file is given with its .py.")
    if not spec.origin or not spec.origin.endswith(".py"):
        raise UsageError(f"--import {name}: a module without a source file.")
    return Path(os.path.abspath(spec.origin))


def _find_spec(name: str, path: Iterable[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        found: ModuleSpec | None = find(name, path) if find else None
        if found is not None:
            return found
    return None


def named(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the files and modules of ``CROSSX_IMPORT``."""
    value = (os.environ if environment is None else environment).get(VARIABLE, "")
    return [word for word in value.split(os.pathsep) if word]


def join(words: Iterable[str]) -> str:
    """Return the value of ``CROSSX_IMPORT`` for files and modules.

    Raises:
        UsageError: If a name contains the separator.
    """
    words = list(words)
    for word in words:
        if os.pathsep in word:
            raise UsageError(f"--import {word}: the path contains {os.pathsep!r}: rename it.")
    return os.pathsep.join(words)


def failure(error: BaseException, file: Path | None = None) -> str:
    """Describe in one phrase why code cannot be imported, with the line where it failed."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}, line {error.lineno}"
    where, trace = "", error.__traceback__
    while trace is not None:
        if file is not None and trace.tb_frame.f_code.co_filename == str(file):
            where = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    said = first_line(error)
    kind = type(error).__name__
    return f"{said if said == kind else f'{kind}: {said}'}{where}"


def trusted_file() -> Path:
    """Return the list of what this user has imported: ``$XDG_STATE_HOME/crossx/imports.jsonl``."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.path.expanduser(state)) / "crossx" / "imports.jsonl"


def trust(source: Source) -> None:
    """Remember that this user has named a file or module with its present content.

    Raises:
        CrossXError: If it cannot be remembered.
    """
    if is_trusted(source):
        return
    path = trusted_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(path, flags, 0o600), "ab") as file:
            # one write, since several processes may append; the first newline ends what a killed one has left
            file.write(f"\n{json.dumps(source.to_json())}\n".encode())
    except OSError as error:
        raise CrossXError(f"{path}: cannot be written to ({error.strerror or error}).") from error


def is_trusted(source: Source) -> bool:
    """Return whether this user has named this file or module with this content before."""
    path = trusted_file()
    try:
        about = path.stat()
        # a list that somebody else can write to says nothing
        if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        lines = read_bytes(path, MAX_LIST).splitlines()
    except (OSError, CrossXError):
        return False
    wanted = source.to_json()
    for line in reversed(lines):
        try:
            if line and json.loads(line) == wanted:
                return True
        except (ValueError, RecursionError):
            continue
    return False


def refuse(source: Source, folder: Path) -> str | None:
    """Say why a run's code is not imported unasked; None if it may be.

    Args:
        source: What the run names; may be of unknown origin.
        folder: The run folder.
    """
    option = f"--import {quoted(source.word)}"
    ask = f"Read it, and give {option}"
    if not source.path.is_absolute() or ".." in source.path.parts:
        return "Its run.json names no absolute path: give --import with the file that registers the method"
    inside = Path(os.path.realpath(source.path)).is_relative_to(os.path.realpath(folder))
    if inside or source.path.is_relative_to(os.path.abspath(folder)):
        return f"Its code is in the run folder, from which nothing is imported unasked. {ask}"
    if not is_trusted(source):
        return f"Its code is {source.word}, which you have not imported on this machine as it was then. {ask}"
    try:
        present = find_module(source.module) if source.module else source.path
        if present != source.path:
            return f"{source.module} is now another file, {present}. {ask}"
        if digest(present) != source.sha256:
            return f"{source.path} has changed since the training: give {option} to use it as it is"
    except UsageError as error:
        missing = str(error).removeprefix("--import ").rstrip(".")
        return f"Its code cannot be found ({missing}): give --import with the file that registers the method"
    return None
