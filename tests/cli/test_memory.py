import os
import subprocess
import sys

import pytest

HELD = """
from pathlib import Path
from crossx.cli.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

keep_freed_memory()
before = resident()
large = bytearray(b"1") * 200_000_000
del large
print(resident() - before)
"""


def held_after_200_mb_were_freed(**environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    answer = subprocess.run(
        [sys.executable, "-c", HELD], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return int(answer.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_is_kept_unless_the_user_has_set_malloc_up() -> None:
    assert held_after_200_mb_were_freed() > 150_000_000
    assert held_after_200_mb_were_freed(MALLOC_ARENA_MAX="4") < 50_000_000
    assert held_after_200_mb_were_freed(GLIBC_TUNABLES="glibc.malloc.check=0") < 50_000_000


AT_EXIT = """
import atexit, gc
from crossx.cli.main import main

atexit.register(lambda: print("last", gc.get_freeze_count() > 100))
main(["--version"])
atexit.register(lambda: print("first", gc.get_freeze_count() > 100))
"""


def test_objects_are_left_to_the_kernel_at_exit_after_what_the_verbs_do_there() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["first False", "last True"]
