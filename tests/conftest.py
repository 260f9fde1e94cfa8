"""Settings for all tests."""

import os

from hypothesis import HealthCheck, settings

# The networks are tiny: threads would wait for each other longer than they compute. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine everything takes longer: no limit of a library, or of Hypothesis, is reached.
for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "RAY_worker_register_timeout_seconds"):
    os.environ.setdefault(name, "300")
settings.register_profile("crossx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crossx")
