"""A preset from images to a tested, calibrated and exported model: time of each command, and accuracy.

    python benchmarks/fast.py --data.dataset cub --data.root $CROSSX_DATA/cub80 \\
      --model.backbone local-dir:$CROSSX_DATA/weights/tf_efficientnet_lite0 --seeds 0 1 2

Runs `crossx fit`, which also calibrates, `test` and `export` for each seed, each as a process of its own, and measures
its wall time and the processor time, user and system, of it and the processes that it starts. Options that are not
listed below are passed on to `crossx fit`. Time in the first seconds of a process is that of the imports. What is
already in the JSON file with the same options is not measured again; `--output` chooses another file. The temperature
is fitted on the validation images, accuracy and calibration error are those of the test images. Needs
`pip install -e ".[export]"` for ONNX and OpenVINO.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossx.evaluation.intervals import student_interval
from crossx.recipes import PRESETS
from harness import RESULTS, table, without_folder, write

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=[*PRESETS], default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--export", choices=[*ENDINGS], default="onnx", help="format (default: onnx)")
    parser.add_argument("--output", type=Path, default=RESULTS / "fast.json")
    options, fit_options = parser.parse_known_args()
    command = ["--preset", options.preset, *(without_folder(word) for word in fit_options)]
    found = json.loads(options.output.read_text()) if options.output.is_file() else {"presets": []}
    entry = next((entry for entry in found["presets"] if entry["options"] == command), None)
    if entry is None:
        found["presets"].append(entry := {"options": command, "runs": {}})
    for seed in options.seeds:
        if str(seed) not in entry["runs"]:
            entry["runs"][str(seed)] = measure(options.preset, fit_options, seed, options.export)
            entry["summary"] = summarize(entry["runs"])
            write(options.output, {"presets": found["presets"]})
    print(shown(entry["runs"], entry["summary"]))


def measure(preset: str, fit_options: Sequence[str], seed: int, export: str) -> dict[str, Any]:
    """Run the commands in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        run, file = Path(folder) / "run", Path(folder) / f"model{ENDINGS[export]}"
        commands: dict[str, list[str]] = {
            "fit": ["--preset", preset, *fit_options, "--seed", str(seed), "--output", str(run)],
            "test": [str(run)],
            "export": [str(run), "--format", export, "--output", str(file)],
        }
        steps = {verb: timed([verb, *words]) for verb, words in commands.items()}
        results = json.loads((run / "test.json").read_text())
        return {
            "steps": steps,
            "top1": results["top1"],
            "images": results["n"],
            "temperature": json.loads((run / "model.json").read_text())["temperature"],
            "ece": results["ece_calibrated"],
            "export": export,
            "bytes": file.stat().st_size,
        }


def timed(words: Sequence[str]) -> dict[str, float]:
    """Run a crossx command; return its wall and processor seconds."""
    print("crossx", " ".join(words), flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "crossx", *words])
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"crossx {words[0]} ended with {process.returncode}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime}


def summarize(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return means over the seeds, with Student's 95% interval of the accuracy and of the wall time."""
    top1 = [run["top1"] for run in runs.values()]
    wall = [total(run, "wall_s") for run in runs.values()]
    cpu = [total(run, "cpu_s") for run in runs.values()]
    return {
        "seeds": len(runs),
        "top1": statistics.mean(top1),
        "top1_interval": student_interval(top1),
        "wall_s": statistics.mean(wall),
        "wall_s_interval": student_interval(wall),
        "cpu_s": statistics.mean(cpu),
        "ece": statistics.mean(run["ece"] for run in runs.values()),
    }


def total(run: Mapping[str, Any], quantity: str) -> float:
    """Return the sum of a quantity over the commands."""
    return sum(step[quantity] for step in run["steps"].values())


def with_interval(mean: float, interval: Sequence[float] | None, form: str) -> str:
    """Return a mean and its interval, which a single run does not have."""
    return f"{mean:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def shown(runs: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return a table with a row per seed and one of the means."""
    verbs = list(next(iter(runs.values()))["steps"])
    rows: list[list[str]] = []
    for seed, run in runs.items():
        rows.append(
            [
                f"seed {seed}",
                f"{run['top1']:.2%}",
                f"{run['ece']:.2%}",
                *(f"{step['wall_s']:.0f}" for step in run["steps"].values()),
                f"{total(run, 'wall_s'):.0f}",
                f"{total(run, 'cpu_s'):.0f}",
            ]
        )
    means = [statistics.mean(run["steps"][verb]["wall_s"] for run in runs.values()) for verb in verbs]
    rows.append(
        [
            "mean",
            with_interval(summary["top1"], summary["top1_interval"], ".2%"),
            f"{summary['ece']:.2%}",
            *(f"{mean:.0f}" for mean in means),
            with_interval(summary["wall_s"], summary["wall_s_interval"], ".0f"),
            f"{summary['cpu_s']:.0f}",
        ]
    )
    return table(
        ["", "top-1", "calibration error", *(f"{verb}, s" for verb in verbs), "all, s", "processor, s"], rows
    )


if __name__ == "__main__":
    main()
