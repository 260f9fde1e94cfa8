"""Settings for all tests."""

import os

# The networks are tiny: threads would wait for each other longer than they compute. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
