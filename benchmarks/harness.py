"""Shared code of the benchmarks: interleaved timing, description of the machine, tables and JSON.

Absolute times differ between runs and machines. Candidates are therefore timed in turn (A B A B ...) and compared by
the ratio within a round; tables show the median, smallest and largest ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("fp32", "tf32", "bf16")
"""``fp32`` without TF32 on a GPU; on a CPU there is none."""
PACKAGES = (
    "crossx",
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "numpy",
    "pillow",
    "fastapi",
    "uvicorn",
    "onnxruntime",
    "openvino",
    "nncf",
)


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one candidate, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "runs": len(self.seconds),
        }


@dataclass(frozen=True)
class Ratio:
    """Time divided by the reference's time in the same round: median, smallest, largest."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.min:.3f} to {self.max:.3f})"


def parser(description: str | None, name: str, *, runs: int, peer: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the common options of the benchmarks."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--runs", type=int, default=runs, help=f"timed rounds (default: {runs})")
    options.add_argument(
        "--output",
        type=Path,
        default=RESULTS / f"{name}.json",
        help="JSON file to write (default: %(default)s)",
    )
    if peer:
        options.add_argument(
            "--peer-root", type=Path, action="append", default=[], metavar="DIR",
            help="a clone of https://github.com/cswluo/CrossX or https://github.com/Hawkeye-FineGrained/Hawkeye; "
            "may be given twice",
        )  # fmt: skip
    return options


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    runs: int,
    warmup: int = 1,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 1,
) -> dict[str, Timing]:
    """Time the candidates in turn, for ``runs`` rounds after ``warmup`` discarded rounds.

    A round runs each candidate ``repeats`` times between two synchronisations, and takes the mean. A ``pause`` in
    seconds before each lets the threads of the previous candidate go to sleep instead of spinning. With the ``clock``
    ``time.process_time`` and one thread, other programs on the machine matter less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(-warmup, runs):
        for name, candidate in candidates.items():
            time.sleep(pause)
            synchronize()
            start = clock()
            for _ in range(repeats):
                candidate()
            synchronize()
            if done >= 0:
                seconds[name].append((clock() - start) / repeats)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratios(timings: Mapping[str, Timing], reference: str) -> dict[str, Ratio]:
    """Return the ratio of each candidate's time to the reference's, per round."""
    base = timings[reference].seconds
    found = {}
    for name, timing in timings.items():
        rounds = [own / other for own, other in zip(timing.seconds, base, strict=True)]
        found[name] = Ratio(statistics.median(rounds), min(rounds), max(rounds))
    return found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions on a GPU; PyTorch allows it only in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of the packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results with the description of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


def without_folder(word: str) -> str:
    """Return a word as it is recorded: paths differ between machines."""
    kind, colon, path = word.rpartition(":")
    return kind + colon + Path(path).name if "/" in path else word


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if unit in flags]
    return f"{name} ({', '.join(units)})"
