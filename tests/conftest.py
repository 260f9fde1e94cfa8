"""Settings for all tests."""

import os

from hypothesis import HealthCheck, settings

# The networks are tiny: threads would wait for each other longer than they compute. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a busy machine is no failure
settings.register_profile("crossx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crossx")
