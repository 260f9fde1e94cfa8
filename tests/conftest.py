"""Settings for all tests."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The networks are tiny: threads would wait for each other longer than they compute. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine everything takes longer: no limit of a library, or of Hypothesis, is reached.
for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "RAY_worker_register_timeout_seconds"):
    os.environ.setdefault(name, "300")
settings.register_profile("crossx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crossx")

# What takes longer than a second here would be named on stderr, which tests read.
os.environ.setdefault("CROSSX_PROGRESS", "0")
# readline, which pytest imports, gives the worker processes a width.
os.environ.pop("COLUMNS", None)

# Tests are offline, and some import OpenVINO themselves; see ``without_telemetry``.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

LONG = ("training/test_data_parallel_fit.py", "serve/test_server.py", "training/", "export/", "methods/")
"""Files that take longest: begun first, none of them is left to one process at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by how long they take; the tests of a file keep their order."""
    tests = os.path.dirname(__file__)

    def turn(item: pytest.Item) -> int:
        path = os.path.relpath(item.path, tests)
        return next((index for index, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=turn)


@pytest.fixture(scope="module")
def forked_mat() -> Iterator[None]:
    """Read .mat files in forks of one process: a process per file would take half a minute."""
    import fuzzing
    from crossx.data.readers import mat

    forks = fuzzing.Forks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mat, "run_child", forks)
        yield
    forks.close()
