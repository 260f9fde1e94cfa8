"""Exported Cross-X whose ONNX graph pools over all positions, compared with one that reduces over them.

    OMP_NUM_THREADS=1 python benchmarks/onnx_pooling.py

ONNX Runtime, ResNet-50 at 448 x 448 with 200 classes, P = 2, CPU time of one thread; weights and pixels for int8
calibration are random.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import onnx
import torch

from backends import Run, open_onnxruntime
from crossx.export import onnx_graph
from crossx.export.quantize import quantize_onnx
from exported import CALIBRATION_IMAGES, NETWORKS, PAUSE, exported
from harness import interleave, parser, ratios, table, write

NETWORK = NETWORKS[0]
FORMS = ("reducing", "pooling")


def forms(folder: Path, images: torch.Tensor) -> Iterator[tuple[tuple[str, str], Run]]:
    """Write the files of both forms, and yield (precision, form) and the function of each."""
    inference = exported(NETWORK, "crossx")
    for form in FORMS:
        # as exported before there was pooling
        unchanged = mock.patch.object(onnx_graph, "_pool_globally")
        with unchanged if form == "reducing" else nullcontext():
            graph = onnx_graph.export_onnx(inference, images)
        for precision in ("fp32", "int8"):
            path = folder / f"{form}.{precision}.onnx"
            onnx.save(graph if precision == "fp32" else quantize_onnx(graph, [images]).graph, path)
            yield (precision, form), open_onnxruntime(path)


def main() -> None:
    options = parser(__doc__, "onnx_pooling", runs=15)
    options.add_argument(
        "--batches", default="1,8", help="batch sizes, comma-separated (default: %(default)s)"
    )
    arguments = options.parse_args()
    torch.set_num_threads(1)
    pixels = torch.randint(256, (CALIBRATION_IMAGES, 3, NETWORK.size, NETWORK.size), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        found = dict(forms(Path(folder), pixels))
    measured = {}
    for batch in map(int, arguments.batches.split(",")):
        images = torch.randint(256, (batch, 3, NETWORK.size, NETWORK.size), dtype=torch.uint8)
        for precision in ("fp32", "int8"):
            timings = interleave(
                {form: partial(found[precision, form], images) for form in FORMS},
                arguments.runs,
                2,
                PAUSE,
                time.process_time,
            )
            measured[f"{precision}, batch {batch}"] = {
                **{form: timing.to_json() for form, timing in timings.items()},
                "ratio": vars(ratios(timings, "reducing")["pooling"]),
            }
    rows = [
        [what, *(f"{own[form]['median_s'] * 1e3:.1f}" for form in FORMS), f"{own['ratio']['median']:.3f}"]
        for what, own in measured.items()
    ]
    print(table(["", *FORMS, "ratio"], rows))
    write(arguments.output, {"command": " ".join(sys.argv), "measured": measured})


if __name__ == "__main__":
    main()
