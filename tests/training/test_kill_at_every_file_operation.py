"""Trainings killed before, within and after their file operations, and resumed: no file differs afterwards.

A training takes a second: by default some boundaries are tried, ``CROSSX_KILLS=all`` tries every one (about an hour).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("library") / "kill_at.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "kill_at.c"), "-ldl", "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the C compiler fails: {built.stderr.strip().splitlines()[-1]}")
    return library


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "every"), [("fit", 8), ("resume", 16), ("restart", 24)])
def test_a_training_killed_anywhere_ends_as_one_that_was_not(library, images, tmp_path, scenario, every):
    """A first training; a resume whose newest checkpoint is damaged; a restart after all of them were."""
    steps = ["1", "1"] if os.environ.get("CROSSX_KILLS") == "all" else [str(every), str(20 * every)]
    command = [sys.executable, str(HERE / "kill_everywhere.py"), scenario, str(images), str(tmp_path), *steps]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{scenario}: {sum(result['operations'].values())} file operations, {result['boundaries']} boundaries, "
        f"{result['kills']} kills, {len(result['differences'])} differences"
    )
    # what a run cannot do without
    assert {"open", "write", "fsync", "rename", "unlink", "mkdir"} <= result["operations"].keys()
    assert result["kills"] > 10
    assert result["differences"] == {}
