"""Run as a script: predict a collection and kill this process without warning after some images."""

import os
import signal
import sys

from crossx.predict.collection import predict_collection

if __name__ == "__main__":
    run, source, output, last = sys.argv[1:]

    def progress(done, total):
        if done >= int(last):
            os.kill(os.getpid(), signal.SIGKILL)

    predict_collection(run, source, output, shard_size=4, device="cpu", progress=progress)
