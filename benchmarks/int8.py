"""Accuracy and time of trained runs in int8, with and without control of the accuracy.

    OMP_NUM_THREADS=1 python benchmarks/int8.py RUN... --data-root $CROSSX_DATA/cub80

`crossx export` writes each run in float32 and in int8, without control and with each of `--max-drops`. Accuracy is that
of the validation images, on which it is controlled, and of the test images, both compared with eager float32 image by
image. Time is processor time of one thread per image at batch 1, in turn; `openvino bf16` is the float32 file with a
precision hint. `int8, before` is ONNX as `crossx export` wrote it before: biases are not corrected, and gates and merge
of Cross-X stay in float. What is in the JSON file already is not measured again, and several processes may write to it.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import torch

from backends import Run, open_onnxruntime, open_openvino
from crossx.errors import CrossXError
from crossx.export import quantize
from crossx.export.export import ExportReport, export_run
from crossx.layers import MergedLogits, SeparateGates
from harness import interleave, parser, table, write

ENDINGS = {"openvino": ".xml", "onnx": ".onnx"}
UNLIMITED = 1.0
"""Tolerance with which every file is written."""
REPEATS = 5
BEFORE = "int8, before"


def in_float(node: onnx.NodeProto) -> bool:
    """Say whether a node stayed in float in `int8, before`."""
    modules = [entry.value for entry in node.metadata_props if entry.key.endswith("class_hierarchy")]
    layers = MergedLogits.__name__, SeparateGates.__name__
    return node.op_type == "Softmax" or any(layer in own for layer in layers for own in modules)


def export(run: Path, file: Path, data: Path, precision: str, max_drop: float | None) -> ExportReport | str:
    """Export a run, or return why it is refused."""
    earlier = {"_stays_in_float": in_float, "correct_biases": lambda *arguments: None}
    try:
        with mock.patch.multiple(quantize, **earlier) if precision == BEFORE else nullcontext():
            return export_run(
                run, file, precision=precision.split(",")[0], root=data, max_drop=max_drop,
                tolerance=UNLIMITED if precision.startswith("int8") else None,
            )  # fmt: skip
    except CrossXError as error:
        return str(error).replace(f"{file}: ", "")


def facts(report: ExportReport) -> dict[str, Any]:
    """Return what the table shows of an int8 file."""
    found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in report.files)}
    if report.accuracy is not None:
        found["test"] = asdict(report.accuracy)
    if report.control is not None:
        found |= {
            "validation": asdict(report.control.accuracy),
            "layers": len(report.control.layers),
            "reverted": report.control.reverted,
        }
    return found


def measure(run: Path, data: Path, format_: str, drops: list[float], rounds: int) -> dict[str, Any]:
    """Export one run in all precisions, and time the files."""
    wanted = [("fp32", None), ("int8", None), *(("int8", drop) for drop in drops)]
    if format_ == "onnx":
        wanted.insert(1, (BEFORE, None))
    entry: dict[str, Any] = {}
    files: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision, drop in wanted:
            name = precision if drop is None else f"{precision}, --max-drop {drop:g}"
            file = Path(folder) / f"{len(files)}{ENDINGS[format_]}"
            start = time.process_time()
            report = export(run, file, data, precision, drop)
            seconds = time.process_time() - start
            if isinstance(report, str):
                entry[name] = {"refused": report, "export_s": seconds}
                continue
            entry[name] = facts(report) | {"export_s": seconds}
            files[name] = open_openvino(file, "f32") if format_ == "openvino" else open_onnxruntime(file)
            if precision == "fp32" and format_ == "openvino":
                entry["bf16"], files["bf16"] = {}, open_openvino(file, "bf16")
        size = int(read_run(run)["preprocessing"]["image_size"])
        image = torch.randint(256, (1, 3, size, size), dtype=torch.uint8)
        timings = interleave(
            {name: partial(run_, image) for name, run_ in files.items()},
            rounds, warmup=3, clock=time.process_time, repeats=REPEATS,
        )  # fmt: skip
    for name, timing in timings.items():
        entry[name]["time"] = timing.to_json()
    return entry


def read_run(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "model.json").read_text())
    return found


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    return found["runs"]


def rows(runs: dict[str, Any]) -> list[list[str]]:
    shown = []
    for run, formats in runs.items():
        for format_, entry in formats.items():
            for name, own in entry.items():
                test, validation = own.get("test"), own.get("validation")
                shown.append(
                    [
                        run, format_, name,
                        f"{validation['before']:.2%}, {validation['after']:.2%}" if validation else "",
                        f"{test['before']:.2%}" if test else "",
                        f"{test['after']:.2%}" if test else own.get("refused", "")[:40],
                        f"{test['before'] - test['after']:.2%} ({test['lost'][0]:.2%} to {test['lost'][1]:.2%})"
                        if test else "",
                        f"{len(own['reverted'])} of {own['layers']}" if "layers" in own else "",
                        f"{own['time']['median_s'] * 1e3:.2f}" if "time" in own else "",
                        f"{own['export_s']:.0f}" if "export_s" in own else "",
                    ]
                )  # fmt: skip
    return shown


def main() -> None:
    """Measure what is missing, print and write."""
    options = parser(__doc__, "int8", runs=15)
    options.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run folder")
    options.add_argument("--data-root", required=True, type=Path, help="root folder of the dataset")
    options.add_argument("--max-drops", type=float, nargs="+", default=[0.2], help="points (default: 0.2)")
    options.add_argument("--formats", nargs="+", choices=[*ENDINGS], default=[*ENDINGS])
    arguments = options.parse_args()
    torch.set_num_threads(1)
    for run in arguments.folders:
        for format_ in arguments.formats:
            if format_ in load(arguments.output).get(run.name, {}):
                continue
            entry = measure(run, arguments.data_root, format_, arguments.max_drops, arguments.runs)
            runs = load(arguments.output)
            runs.setdefault(run.name, {})[format_] = entry
            write(arguments.output, {"clock": "process_time", "runs": runs})
    headers = [
        "run",
        "format",
        "precision",
        "validation",
        "before",
        "test",
        "lost",
        "in float",
        "ms",
        "export, s",
    ]
    print(table(headers, rows(load(arguments.output))))


if __name__ == "__main__":
    main()
