"""Bounds on the time of an exported network in float32, bfloat16 and int8, and what int8 spends its time on.

    OMP_NUM_THREADS=1 python benchmarks/int8_roofline.py

One image, OpenVINO, processor time of one thread; networks, weights and pixels as in exported.py. FLOPs are those of
the graph's convolutions and matrix products, two per multiply-add. The bound is the larger of two times: FLOPs divided
by the speed of a large matrix product of the precision in PyTorch (int8: torch._int_mm), and the bytes of the weights
and the image divided by the speed of a copy. The layers' times are OpenVINO's own counters, smallest of the rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import onnx
import openvino
import torch
from torch import Tensor

from backends import open_openvino
from crossx.export.onnx_graph import export_onnx
from crossx.export.quantize import quantize_openvino
from exported import CALIBRATION_IMAGES, METHODS, NETWORKS, Network, exported
from harness import interleave, parser, table, write
from roofline import FLOATS, MATRIX

BYTES = {"f32": 4, "bf16": 2, "int8": 1}
"""Precision -> bytes per weight."""


def peaks(rounds: int) -> tuple[dict[str, float], float]:
    """Return FLOP/s of a matrix product in each precision, and bytes/s of a copy (read and written)."""
    left, right = torch.randint(-100, 100, (2, MATRIX, MATRIX)).float()
    source = torch.randn(FLOATS)
    target = torch.empty_like(source)
    types = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    runs: dict[str, Callable[[], object]] = {
        name: partial(torch._int_mm if name == "int8" else torch.mm, left.to(kind), right.to(kind))
        for name, kind in types.items()
    }
    timings = interleave(
        runs | {"copy": lambda: target.copy_(source)}, rounds, warmup=2, clock=time.process_time
    )
    speeds = {name: 2 * MATRIX**3 / min(timings[name].seconds) for name in types}
    return speeds, 2 * source.numel() * source.element_size() / min(timings["copy"].seconds)


def count(graph: openvino.Model) -> tuple[int, int]:
    """Return the FLOPs of a graph's convolutions and matrix products, and the number of its weights."""
    flops = weights = 0
    for op in graph.get_ordered_ops():
        kind = op.get_type_name()
        if kind == "Constant" and op.get_element_type().is_real():
            weights += prod(op.get_shape())
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        out, kernel = prod(op.output(0).get_shape()), op.input(1).get_shape()
        # kernels are (out, in, h, w), or (groups, out, in, h, w)
        products = op.input(0).get_shape()[-1] if kind == "MatMul" else prod(kernel[-3:])
        flops += 2 * out * products
    return flops, weights


def profile(file: Path, image: Tensor, rounds: int) -> dict[str, float]:
    """Return kind of kernel -> milliseconds in the int8 file, the smallest of the rounds for each layer."""
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERF_COUNT": True,
    }
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    seconds: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        request.infer([image.numpy()])
        for node in request.get_profiling_info():
            if node.real_time.total_seconds():
                key = (node.node_name, f"{node.node_type}, {node.exec_type}")
                seconds[key] = min(seconds.get(key, 1e9), node.real_time.total_seconds())
    found: dict[str, float] = defaultdict(float)
    for (_, kind), own in seconds.items():
        found[kind] += own * 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(network: Network, method: str, rounds: int) -> dict[str, Any]:
    """Write the network's files, and return its FLOPs, times and profile."""
    pixels = torch.randint(256, (CALIBRATION_IMAGES, 3, network.size, network.size), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        whole, int8 = Path(folder) / "f32.onnx", Path(folder) / "int8.xml"
        onnx.save(export_onnx(exported(network, method), pixels), whole)
        graph = openvino.Core().read_model(whole)
        openvino.save_model(quantize_openvino(graph, [pixels]).graph, int8)
        runs = {
            "f32": open_openvino(whole, "f32"),
            "bf16": open_openvino(whole, "bf16"),
            "int8": open_openvino(int8, "f32"),
        }
        image = pixels[:1].contiguous()
        timings = interleave(
            {name: partial(run, image) for name, run in runs.items()},
            rounds, warmup=2, clock=time.process_time,
        )  # fmt: skip
        kinds = profile(int8, image, rounds)
        graph = openvino.Core().read_model(whole)
        graph.reshape([1, 3, network.size, network.size])
        flops, weights = count(graph)
    return {
        "backbone": network.backbone, "size": network.size, "method": method, "flops": flops, "weights": weights,
        "times": {name: timing.to_json() for name, timing in timings.items()}, "int8_ms": kinds,
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    options = parser(__doc__, "int8_roofline", runs=9)
    options.add_argument("--backbones", nargs="+", default=[network.backbone for network in NETWORKS])
    arguments = options.parse_args()
    torch.set_num_threads(1)
    speeds, bandwidth = peaks(arguments.runs)
    print(
        {name: f"{speed / 1e9:.0f} GFLOP/s" for name, speed in speeds.items()}, f"{bandwidth / 1e9:.1f} GB/s"
    )
    networks, rows = [], []
    for network in NETWORKS:
        for method in METHODS if network.backbone in arguments.backbones else ():
            found = measure(network, method, arguments.runs)
            found["bounds_s"] = {
                name: max(
                    found["flops"] / speeds[name],
                    (found["weights"] * size + 3 * network.size**2) / bandwidth,
                )
                for name, size in BYTES.items()
            }
            networks.append(found)
            for name in BYTES:
                low, own = found["bounds_s"][name] * 1e3, found["times"][name]["median_s"] * 1e3
                rows.append(
                    [
                        f"{network.backbone}, {method}", name, f"{found['flops'] / 1e9:.2f}",
                        f"{low:.2f}", f"{own:.2f}", f"{own / low:.2f}",
                    ]
                )  # fmt: skip
            total = sum(found["int8_ms"].values())
            for kind, milliseconds in list(found["int8_ms"].items())[:8]:
                print(f"  {milliseconds:8.3f} ms {milliseconds / total:6.1%}  {kind}")
            print(table(["network", "precision", "GFLOP", "bound, ms", "measured, ms", "ratio"], rows))
    write(arguments.output, {"flops_per_s": speeds, "bytes_per_s": bandwidth, "networks": networks})


if __name__ == "__main__":
    main()
