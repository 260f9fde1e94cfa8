"""Read .mat files in a child process with limits: scipy's reader crashes on some damaged files.

The child runs this file as a script. It imports only NumPy and scipy.io, and answers with JSON.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Address space of the child in bytes, libraries included."""
SECONDS = 60
"""Processor time of the child, and a tenth of the time that it may wait for the disk."""


class UnreadableMatError(Exception):
    """The file cannot be read; the message says why."""


def read_mat(path: Path, variables: tuple[str, ...]) -> dict[str, Any]:
    """Return variables of a .mat file: structs as dicts, arrays as lists, text and numbers; those missing are left out.

    Values of other types (complex numbers, functions) are None.

    Raises:
        UnreadableMatError: If the file is damaged, or reading it takes too much memory or time.
    """
    code, answer = run_child(path, variables)
    if code < 0:
        if code == -signal.SIGXCPU:
            raise UnreadableMatError(f"it takes more than {SECONDS} s")
        with contextlib.suppress(ValueError):
            raise UnreadableMatError(f"its reader stopped with {signal.Signals(-code).name}")
        raise UnreadableMatError(f"its reader stopped with signal {-code}")
    try:
        values = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise UnreadableMatError("its reader gave no answer") from error
    if "error" in values:
        raise UnreadableMatError(values["error"])
    found: dict[str, Any] = values["variables"]
    return found


def run_child(path: Path, variables: tuple[str, ...]) -> tuple[int, bytes]:
    """Run the child and return its exit code, negative for a signal, and its answer."""
    # -P: this folder holds modules that could hide others
    command = [sys.executable, "-P", __file__, str(path), *variables]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=10 * SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -signal.SIGXCPU, b""
    return done.returncode, done.stdout


def answer(path: str, variables: list[str]) -> bytes:
    """Return the child's answer, within its limits: the variables or an error, as JSON."""
    limit()
    try:
        from scipy.io import loadmat

        content = loadmat(path, simplify_cells=True, variable_names=variables)
        found = {name: _plain(content[name]) for name in variables if name in content}
        return json.dumps({"variables": found}).encode()
    except MemoryError:
        return json.dumps({"error": f"it takes more than {MEMORY >> 30} GiB of memory"}).encode()
    except Exception as error:  # on damaged files scipy raises whatever its decoders raise
        return json.dumps({"error": type(error).__name__}).encode()


def limit() -> None:
    """Limit memory and processor time of this process, and write no core files."""
    import resource

    for what, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        # macOS has no limit of the address space, and a lower limit may be in force
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def _plain(value: Any) -> Any:
    import numpy as np

    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float) else None


if __name__ == "__main__":
    sys.stdout.buffer.write(answer(sys.argv[1], sys.argv[2:]))
