"""Cost on a CPU of glibc's returning freed memory to the kernel, which must then provide it again page by page.

    python benchmarks/allocator.py

Each candidate runs in its own process, in turn: default glibc (``returned``), with huge pages for PyTorch's tensors
(``huge pages``, THP_MEM_ALLOC_ENABLE=1), and with the setting of the command ``crossx`` (``kept``). ResNet-50, 448 x
448: inference and training steps with 8 images, plain and Cross-X. Peak memory is the resident memory of the process.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from statistics import median

import torch

import crossx
from crossx.cli.memory import keep_freed_memory
from harness import Timing, parser, ratios, table, write
from training_step import Candidate, batch

STEPS, WARMUP, BATCH = 3, 2, 8
SETTINGS = ("returned", "huge pages", "kept")


def inference(method: str) -> Callable[[], object]:
    network = crossx.create_method(method, backbone="resnet50", num_classes=200)
    network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    images = batch(BATCH)[0].contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def step() -> object:
        return network(images)

    return step


def training(method: str) -> Callable[[], object]:
    return Candidate(method).build(*batch(BATCH), bf16=False)


WORK = {"inference": inference, "training step": training}


def measure(setting: str, work: str, method: str) -> tuple[float, int]:
    """Return seconds per step and peak bytes; must run in a separate process."""
    if setting == "kept":
        keep_freed_memory()
    step = WORK[work](method)
    seconds = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARMUP:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(setting: str, work: str, method: str) -> tuple[float, int]:
    os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(setting == "huge pages"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (setting, work, method))


def main() -> None:
    arguments = parser(__doc__, "allocator", runs=5).parse_args()
    rows, results = [], {}
    for work in WORK:
        for method in ("plain", "crossx"):
            found: dict[str, list[tuple[float, int]]] = {setting: [] for setting in SETTINGS}
            for _ in range(arguments.runs):
                for setting, measured in found.items():
                    measured.append(in_own_process(setting, work, method))
            timings = {
                name: Timing(tuple(seconds for seconds, _ in rounds)) for name, rounds in found.items()
            }
            peaks = {name: median(peak for _, peak in rounds) for name, rounds in found.items()}
            over = ratios(timings, "returned")
            for name, timing in timings.items():
                rows.append(
                    [work, method, name, f"{timing.median:.2f}", over[name], f"{peaks[name] / 2**30:.2f}"]
                )
                results[f"{work}, {method}, {name}"] = {
                    **timing.to_json(),
                    "over_returned": vars(over[name]),
                    "peak_bytes": peaks[name],
                }
    print(table(["work", "method", "freed memory", "seconds", "time / returned", "peak GiB"], rows))
    write(arguments.output, {"batch_size": BATCH, "results": results})


if __name__ == "__main__":
    main()
