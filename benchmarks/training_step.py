"""A training step of Cross-X compared with a plain ResNet-50 and other implementations: time and peak memory.

    python benchmarks/training_step.py --peer-root DIR
    python benchmarks/training_step.py --precision tf32 --peer-root DIR

DIR is a clone of https://github.com/cswluo/CrossX (or Hawkeye), run as published: float32, its own memory format.
ResNet-50, 448 x 448, P = 2, 200 classes, SGD with momentum; objective, backward pass and optimiser step. Cross-X and
plain use channels last and, on a GPU, bfloat16 autocast; with ``--precision fp32`` no candidate uses TF32 on a GPU,
otherwise the others may. Peak memory is that of a separate process (resident on the CPU, allocated on a GPU) that takes
two steps: the median of three such processes, in turn. On a GPU a timed round is several steps between two
synchronisations, as in a training loop, whose CPU runs ahead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import crossx
from crossx.methods import Method
from crossx.training.config import OptimConfig
from crossx.training.optim import build_optimizer
from harness import PRECISIONS, Ratio, Timing, interleave, parser, ratios, set_tf32, table, write
from peers import Peer

CLASSES, SIZE = 200, 448
PROCESSES = 3
"""In which peak memory is measured."""
GPU_STEPS = 5
"""Steps per timed round on a GPU."""
Step = Callable[[], object]

REACH = {
    "cpu": (("crossx", "released", 0.85, 0.95), ("crossx, recompute", "released", None, 0.6)),
    "cuda": (("crossx", "plain", 1.35, None), ("crossx", "released", 1 / 3, 0.55)),
}
"""Candidate, reference, and the targets for the ratios of time and peak memory."""
IMAGES_PER_SECOND = 1500
"""Target for the fastest plain ResNet-50 in training at 448 px on an H100."""


@dataclass(frozen=True)
class Candidate:
    """A training step of ``crossx fit``.

    Attributes:
        method: Name of the method.
        options: Its options.
        recompute: Whether activations are recomputed in the backward pass.
        compile_mode: Mode of ``torch.compile``; None without it.
        layout: Memory format of network and images.
        backbone: Name of the trunk.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recompute: bool = False
    compile_mode: str | None = None
    layout: torch.memory_format = torch.channels_last
    backbone: str = "resnet50"

    def build(self, images: torch.Tensor, targets: torch.Tensor, bf16: bool) -> Step:
        network = crossx.create_method(
            self.method, backbone=self.backbone, num_classes=CLASSES, **self.options
        )
        if self.recompute:
            network.backbone.recompute_activations()
        return step_of(network, images, targets, self.compile_mode, self.layout, bf16)


def step_of(
    network: Method,
    images: torch.Tensor,
    targets: torch.Tensor,
    compile_mode: str | None = None,
    layout: torch.memory_format = torch.channels_last,
    bf16: bool | None = None,
) -> Step:
    """Return a training step of `crossx fit` on a batch that is already on the device; see ``step_on``."""
    step = step_on(network, images.device, compile_mode, layout, bf16)
    return partial(step, images.contiguous(memory_format=layout), targets)


def step_on(
    network: Method,
    device: torch.device,
    compile_mode: str | None = None,
    layout: torch.memory_format = torch.channels_last,
    bf16: bool | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a training step on images and targets, in bfloat16 by default on a GPU."""
    bf16 = device.type == "cuda" if bf16 is None else bf16
    network.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(network, OptimConfig(lr=0.001))
    objective: Callable[..., Any] = network.objective
    if compile_mode is not None:
        objective = torch.compile(objective, fullgraph=True, mode=compile_mode)

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        if compile_mode is not None:
            # the buffers of a CUDA graph may be used again
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = objective(images.contiguous(memory_format=layout), targets).loss
        loss.backward()
        optimizer.step()

    return step


def peer_step(root: Path, images: torch.Tensor, targets: torch.Tensor) -> Step:
    peer = Peer.load(root)
    network = peer.network(CLASSES).to(images.device).train()
    objective = peer.objective(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        objective(images, targets).backward()
        optimizer.step()

    return step


def candidates(
    peers: list[Path], backbone: str = "resnet50", bf16: bool = False
) -> dict[str, Callable[..., Step]]:
    """Return name -> function that builds a step of (images, targets)."""
    found = {"plain": Candidate("plain", backbone=backbone)}
    for statistics in ("map", "strided", "pooled"):
        name = "crossx" if statistics == "map" else f"crossx, {statistics}"
        found[name] = Candidate("crossx", {"merged_statistics": statistics}, backbone=backbone)
    found["crossx, recompute"] = Candidate("crossx", recompute=True, backbone=backbone)
    if torch.cuda.is_available():
        for method in ("plain", "crossx"):
            found[f"{method}, contiguous"] = Candidate(
                method, layout=torch.contiguous_format, backbone=backbone
            )
            found[f"{method}, compiled"] = Candidate(method, compile_mode="default", backbone=backbone)
            found[f"{method}, CUDA graphs"] = Candidate(
                method, compile_mode="reduce-overhead", backbone=backbone
            )
    steps: dict[str, Callable[..., Step]] = {
        name: partial(candidate.build, bf16=bf16) for name, candidate in found.items()
    }
    return steps | {Peer.load(root).name: partial(peer_step, root) for root in peers}


def batch(size: int, side: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return torch.randn(size, 3, side, side).to(device), torch.randint(CLASSES, (size,)).to(device)


def peak_memory(build: Callable[..., Step], size: int, side: int = SIZE, tf32: bool = True) -> int:
    """Return the peak bytes of two steps; must run in a separate process."""
    set_tf32(tf32)
    step = build(*batch(size, side))
    for _ in range(2):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose(
    found: Mapping[str, Callable[..., Step]], wanted: list[str] | None
) -> dict[str, Callable[..., Step]]:
    if unknown := set(wanted or ()) - set(found):
        sys.exit(f"--candidates: no {', '.join(sorted(unknown))}; there are {', '.join(found)}.")
    return {name: build for name, build in found.items() if wanted is None or name in wanted}


def verdicts(
    time: Mapping[str, dict[str, Ratio]], memory: Mapping[str, float], device: str
) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name, reference, longest, largest in REACH[device]:
        if reference not in memory or name not in memory:
            continue
        if longest is not None:
            ratio = time[reference][name].median
            found.append({"what": f"time of {name} / {reference}", "ratio": ratio, "reach": longest})
        if largest is not None:
            ratio = memory[name] / memory[reference]
            found.append({"what": f"peak memory of {name} / {reference}", "ratio": ratio, "reach": largest})
    return found


def throughput(timings: Mapping[str, Timing], size: int, side: int) -> list[dict[str, object]]:
    """Compare the images per second of the fastest plain step with the target for an H100 at 448 px."""
    name = min((n for n in timings if n.startswith("plain")), key=lambda n: timings[n].median)
    found = size / timings[name].median
    what = f"images per second of {name}, {side} px (target: on an H100, at {SIZE} px)"
    return [
        {"what": what, "at_least": IMAGES_PER_SECOND, "value": found, "reached": found >= IMAGES_PER_SECOND}
    ]


def measure_memory(
    builders: Mapping[str, Callable[..., Step]], arguments: argparse.Namespace
) -> dict[str, list[int]]:
    peaks: dict[str, list[int]] = {name: [] for name in builders}
    for _ in range(arguments.processes):
        for name, build in builders.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                task = build, arguments.batch_size, arguments.size, arguments.precision != "fp32"
                peaks[name].append(pool.apply(peak_memory, task))
    return peaks


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    options = parser(__doc__, "training_step", runs=9, peer=True)
    options.add_argument("--batch-size", type=int, default=32 if on_gpu else 8)
    options.add_argument("--size", type=int, default=SIZE, help="pixels (default: %(default)s)")
    options.add_argument("--backbone", default="resnet50", help="default: %(default)s")
    options.add_argument("--precision", choices=PRECISIONS, default="bf16" if on_gpu else "fp32")
    options.add_argument("--candidates", nargs="*", help="default: all")
    options.add_argument(
        "--processes",
        type=int,
        default=PROCESSES,
        help="that peak memory is measured in (default: %(default)s)",
    )
    arguments = options.parse_args()
    set_tf32(arguments.precision != "fp32")
    bf16 = arguments.precision == "bf16"
    builders = choose(candidates(arguments.peer_root, arguments.backbone, bf16), arguments.candidates)
    peaks = measure_memory(builders, arguments)
    memory = {name: median(found) for name, found in peaks.items()}
    images, targets = batch(arguments.batch_size, arguments.size)
    steps = {name: build(images, targets) for name, build in builders.items()}
    timings = interleave(steps, arguments.runs, warmup=3 if on_gpu else 1, repeats=GPU_STEPS if on_gpu else 1)
    against = {name: ratios(timings, name) for name in ("plain", "released") if name in timings}

    rows = [
        [
            name,
            f"{timing.median:.3g}",
            *(str(found[name]) for found in against.values()),
            f"{memory[name] / 2**30:.2f}",
        ]
        for name, timing in timings.items()
    ]
    print(table(["step", "seconds", *(f"time / {name}" for name in against), "peak GiB"], rows))
    reached = verdicts(against, memory, device)
    for row in reached:
        row["reached"] = float(str(row["ratio"])) <= float(str(row["reach"]))
        print(f"{row['what']}: {row['ratio']:.3f}, target: {row['reach']:.3f}: {row['reached']}")
    if on_gpu:
        rates = throughput(timings, arguments.batch_size, arguments.size)
        reached += rates
        for row in rates:
            print(f"{row['what']}: {row['value']:.0f}, target: {row['at_least']}: {row['reached']}")
    write(
        arguments.output,
        {
            "device": device,
            "precision": arguments.precision,
            "image_size": arguments.size,
            "batch_size": arguments.batch_size,
            "steps": {
                name: {
                    **timing.to_json(),
                    "images_per_second": arguments.batch_size / timing.median,
                    "peak_bytes": {"median": memory[name], "min": min(peaks[name]), "max": max(peaks[name])},
                    **{f"over_{reference}": vars(found[name]) for reference, found in against.items()},
                }
                for name, timing in timings.items()
            },
            "reach": reached,
        },
    )


if __name__ == "__main__":
    main()
