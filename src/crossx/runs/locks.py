"""Keep two processes from working in one folder."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from crossx.errors import CrossXError, first_line
from crossx.runs.files import check_writable, storage_error

if TYPE_CHECKING:
    from filelock import FileLock

LOCK = ".lock"

log = logging.getLogger(__name__)


def is_lock(path: Path) -> bool:
    """Whether a path is the lock file of its folder."""
    return path.name == LOCK


@contextlib.contextmanager
def locked_folder(folder: Path, work: str) -> Iterator[None]:
    """Make a folder and lock it for this process until the block ends.

    The operating system holds the lock on ``folder/.lock`` and frees it when the process ends, also after a crash. On
    a file system without locks the block runs unlocked, with a warning.

    Args:
        folder: The folder.
        work: What this process does, as in "another process is WORK".

    Raises:
        CrossXError: If another process holds the lock, or the folder cannot be written to.
    """
    # slow to import, and most commands need no lock
    from filelock import FileLock, Timeout

    check_writable(folder, folder / LOCK)
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        try:
            # filelock's substitute for file systems without locks would outlive a crash
            lock = FileLock(path, blocking=False, fallback_to_soft=False)
            lock.acquire()
            stack.callback(_free, lock, path)
            started = datetime.now().isoformat(" ", "minutes")
            path.write_text(f"process {os.getpid()} on {platform.node()}, since {started}", encoding="utf-8")
        except Timeout as error:
            raise CrossXError(
                f"{folder}: another process is {work}{_holder(path)}. Wait for it, or choose another --output."
            ) from error
        except PermissionError as error:
            raise storage_error(path, error) from error
        except OSError as error:
            # some network file systems have no locks
            stack.callback(path.unlink, missing_ok=True)
            log.warning(
                "%s: cannot be locked here (%s): start no second process in it.", folder, first_line(error)
            )
        yield


def lock_holder(folder: Path) -> str | None:
    """Return which other process works in a folder, as `` (process 7 on HOST, since TIME)``; None if none does."""
    path = folder / LOCK
    if not path.is_file():
        return None
    from filelock import FileLock, Timeout

    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return _holder(path)
    except OSError:
        return None
    lock.release()
    return None


def stop_holder(folder: Path) -> bool:
    """Ask the process that works in a folder to save its state and end; return whether it could be asked.

    That is a process of this machine which, according to the operating system, has the lock. Only Linux tells that.
    """
    path = folder / LOCK
    with contextlib.suppress(OSError, ValueError):
        status = path.stat()
        inode = str(status.st_ino)
        # "1: FLOCK  ADVISORY  WRITE 7 fe:00:3293192 0 EOF"; one that waits for a lock has "->" in front
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                process = int(fields[4])
                if f"process {process} on {platform.node()}," in _holder(path) and _has_open(process, status):
                    os.kill(process, signal.SIGTERM)
                    return True
    return False


def _has_open(process: int, status: os.stat_result) -> bool:
    """Say whether a process has a file open.

    The number of a dead process, whose children may have inherited the lock, may be that of another process by now; and
    a file on another disk may have the same inode.
    """
    for file in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(file.stat(), status):
                return True
    return False


def _free(lock: FileLock, path: Path) -> None:
    for last in (False, True):
        try:
            # first the file: filelock never takes a deleted one for the lock
            path.unlink(missing_ok=True)
            lock.release(force=True)
            return
        # by torch's signal handler, which raises once per lost worker, wherever the program is
        except RuntimeError:
            if last:
                raise


def _holder(path: Path) -> str:
    """Return `` (process 7 on HOST, since TIME)``, empty where the holder has not written it yet."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        if text := file.readline(200).strip():
            return f" ({text})"
    return ""
