"""Run as a script: train a configuration and kill this process without warning in the middle of an epoch."""

import os
import signal
import sys

from crossx.training.config import Config
from crossx.training.fit import fit
from crossx.training.task import Task

if __name__ == "__main__":
    path, last_step = sys.argv[1], int(sys.argv[2])
    forward = Task.forward
    seen = []

    def counted(self, images, targets):
        seen.append(len(targets))
        if len(seen) == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, images, targets)

    Task.forward = counted
    fit(Config.from_yaml(path))
