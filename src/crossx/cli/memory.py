"""Memory of the process: what is kept, and what is not collected at the end."""

from __future__ import annotations

import atexit
import gc
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation, instead of returning it to the kernel.

    By default every large tensor is mapped anew and its pages are faulted in one by one, which takes up to a third of a
    network's time on a CPU (benchmarks/allocator.py). See https://man7.org/linux/man-pages/man3/mallopt.3.html. Does
    nothing if the user has set up glibc's malloc, or if the process uses another one.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def skip_collection_at_exit() -> None:
    """Let the process end without a last search for reference cycles.

    The search visits all objects of all imported modules several times, which takes most of the time that a process
    with PyTorch needs to exit. Functions that are registered later with ``atexit`` run before.
    """
    atexit.register(gc.freeze)
