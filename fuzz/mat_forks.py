"""Answer requests for .mat files in forks of this small process: what ``crossx.data.readers.mat`` runs as a script."""

from __future__ import annotations

import json
import os
import sys
import warnings

import scipy.io  # noqa: F401  once, before the forks

from crossx.data.readers import mat

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin.buffer:
        path, variables = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with open(writing, "wb") as pipe:
                    pipe.write(mat.answer(path, variables))
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.buffer.write(json.dumps([code, len(answer)]).encode() + b"\n" + answer)
        sys.stdout.buffer.flush()
