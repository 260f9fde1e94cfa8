"""Settings for all tests."""

import contextlib
import os

import pytest
from hypothesis import HealthCheck, settings

# The networks are tiny: threads would wait for each other longer than they compute. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine everything takes longer: no limit of a library, or of Hypothesis, is reached.
for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "RAY_worker_register_timeout_seconds"):
    os.environ.setdefault(name, "300")
settings.register_profile("crossx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crossx")

# Tests are offline. OpenVINO's telemetry would also fork from a thread, and another fork at that moment hangs forever.
with contextlib.suppress(ModuleNotFoundError):
    from openvino_telemetry.backend.backend_ga4 import GA4Backend

    GA4Backend.send = lambda *_: None

LONG = ("training/test_data_parallel_fit.py", "serve/test_server.py", "training/", "export/", "methods/")
"""Files that take longest: begun first, none of them is left to one process at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by how long they take; the tests of a file keep their order."""
    tests = os.path.dirname(__file__)

    def turn(item: pytest.Item) -> int:
        path = os.path.relpath(item.path, tests)
        return next((index for index, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=turn)
