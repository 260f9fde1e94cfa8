"""Exported Cross-X compared with the exported plain backbone, on PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/exported.py
    python benchmarks/exported.py --threads 1 --cpu-time     # on a machine with other work

The files are those of `crossx export`: uint8 input, normalisation included, any batch size. Weights and the pixels for
int8 calibration are random; they do not affect the times. ResNet-50 at 448 x 448 with 200 classes and MobileNetV2 0.35
at 160 x 160 with 80 classes; P = 2. OpenVINO's bf16 is the fp32 file with a precision hint, which processors without
bfloat16 ignore.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import openvino
import torch

from backends import Run, open_onnxruntime, open_openvino
from crossx.export.onnx_graph import export_onnx
from crossx.export.quantize import quantize_onnx, quantize_openvino
from crossx.methods import create_method
from crossx.methods.weights import describe
from crossx.predict.inference import Inference
from crossx.runs import Preprocessing
from harness import Timing, interleave, parser, ratios, table, write
from parity import randomise_norms

METHODS = ("plain", "crossx")
BACKENDS = (
    "torch.export fp32",
    "onnxruntime fp32",
    "openvino fp32",
    "openvino bf16",
    "onnxruntime int8",
    "openvino int8",
)
CALIBRATION_IMAGES = 4
PAUSE = 0.02


@dataclass(frozen=True)
class Network:
    backbone: str
    size: int
    classes: int


NETWORKS = (Network("resnet50", 448, 200), Network("mobilenetv2_035", 160, 80))


def exported(network: Network, method: str) -> Inference:
    """Return a network with random weights, ready for export."""
    torch.manual_seed(0)
    built = create_method(method, backbone=network.backbone, num_classes=network.classes)
    randomise_norms(built)
    preprocessing = Preprocessing(
        network.size, None, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    names = [str(number) for number in range(network.classes)]
    inference = Inference(
        built, describe(built, classes=names, preprocessing=preprocessing, dataset="random")
    )
    inference.use_inference_form()
    return inference


def backends(
    network: Network, method: str, folder: Path, wanted: Collection[str]
) -> Iterator[tuple[str, Run]]:
    """Write the exported files of a method, and yield name and function of each wanted backend."""
    pixels = torch.randint(256, (CALIBRATION_IMAGES, 3, network.size, network.size), dtype=torch.uint8)
    stem = folder / f"{network.backbone}-{method}"
    inference = exported(network, method)
    if "torch.export fp32" in wanted:
        program = torch.export.export(
            inference, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        yield "torch.export fp32", torch.inference_mode()(program.module())
    graph = export_onnx(inference, pixels)
    onnx.save(graph, stem.with_suffix(".onnx"))
    if "onnxruntime fp32" in wanted:
        yield "onnxruntime fp32", open_onnxruntime(stem.with_suffix(".onnx"))
    for precision in ("fp32", "bf16"):
        if f"openvino {precision}" in wanted:
            yield (
                f"openvino {precision}",
                open_openvino(stem.with_suffix(".onnx"), precision.replace("fp", "f")),
            )
    if "onnxruntime int8" in wanted:
        onnx.save(quantize_onnx(graph, [pixels]).graph, stem.with_suffix(".int8.onnx"))
        yield "onnxruntime int8", open_onnxruntime(stem.with_suffix(".int8.onnx"))
    if "openvino int8" in wanted:
        model = openvino.Core().read_model(stem.with_suffix(".onnx"))
        openvino.save_model(quantize_openvino(model, [pixels]).graph, stem.with_suffix(".xml"))
        yield "openvino int8", open_openvino(stem.with_suffix(".xml"), "f32")


def measure(
    network: Network, batches: list[int], runs: int, clock: Callable[[], float], wanted: Collection[str]
) -> dict[str, Any]:
    """Time both methods on each backend, and return the times and the ratios to plain."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            (backend, method): run
            for method in METHODS
            for backend, run in backends(network, method, Path(folder), wanted)
        }
    names = list(dict.fromkeys(backend for backend, _ in found))
    measured: dict[str, Any] = {}
    for batch in batches:
        images = torch.randint(256, (batch, 3, network.size, network.size), dtype=torch.uint8)
        timings = {
            name: interleave(
                {method: partial(found[name, method], images) for method in METHODS}, runs, 2, PAUSE, clock
            )
            for name in names
        }
        show(network, batch, timings)
        measured[str(batch)] = {
            name: {
                **{method: timing.to_json() for method, timing in own.items()},
                "ratio": vars(ratios(own, "plain")["crossx"]),
            }
            for name, own in timings.items()
        }
    return {**vars(network), "batches": measured}


def show(network: Network, batch: int, timings: dict[str, dict[str, Timing]]) -> None:
    rows = [
        [name, *(f"{own[method].median * 1e3:.2f}" for method in METHODS), ratios(own, "plain")["crossx"]]
        for name, own in timings.items()
    ]
    print(f"\n{network.backbone}, {network.size} x {network.size}, batch {batch}, milliseconds")
    print(table(["backend", *METHODS, "ratio"], rows))


def main() -> None:
    options = parser(__doc__, "exported", runs=15)
    options.add_argument(
        "--batches", default="1,8", help="batch sizes, comma-separated (default: %(default)s)"
    )
    options.add_argument(
        "--backbones", default=",".join(n.backbone for n in NETWORKS), help="default: %(default)s"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time; sensible with --threads 1"
    )
    options.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    arguments = options.parse_args()
    wanted = arguments.backends.split(",")
    if unknown := set(wanted) - set(BACKENDS):
        options.error(f"--backends: no {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    chosen = [network for network in NETWORKS if network.backbone in arguments.backbones.split(",")]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    networks = [measure(network, batches, arguments.runs, clock, wanted) for network in chosen]
    write(
        arguments.output,
        {"clock": clock.__name__, "command": " ".join(sys.argv), "networks": networks},
    )


if __name__ == "__main__":
    main()
