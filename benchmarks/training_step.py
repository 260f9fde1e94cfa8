"""A training step of Cross-X compared with a plain ResNet-50 and other implementations: time and peak memory.

    python benchmarks/training_step.py --peer-root DIR

DIR is a clone of https://github.com/cswluo/CrossX (or Hawkeye), run as published: float32, its own memory format.
ResNet-50, 448 x 448, P = 2, 200 classes, SGD with momentum; objective, backward pass and optimiser step. Cross-X and
plain use channels last, and bfloat16 autocast on a GPU. Peak memory is that of a separate process (resident on the CPU,
allocated on a GPU) that takes two steps: the median of three such processes, in turn.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch

import crossx
from crossx.methods import Method
from crossx.training.config import OptimConfig
from crossx.training.optim import build_optimizer
from harness import Ratio, interleave, parser, ratios, table, write
from peers import Peer

CLASSES, SIZE = 200, 448
PROCESSES = 3
"""In which peak memory is measured."""
Step = Callable[[], object]

REACH = {
    "cpu": (("crossx", "released", 0.85, 0.95), ("crossx, recompute", "released", None, 0.6)),
    "cuda": (("crossx", "plain", 1.35, None), ("crossx", "released", 1 / 3, 0.55)),
}
"""Candidate, reference, and the targets for the ratios of time and peak memory."""


def our_step(
    method: str,
    options: Mapping[str, object],
    recompute: bool,
    compiled: bool,
    images: torch.Tensor,
    targets: torch.Tensor,
) -> Step:
    network = crossx.create_method(method, backbone="resnet50", num_classes=CLASSES, **options)  # type: ignore[arg-type]
    if recompute:
        network.backbone.recompute_activations()
    return step_of(network, images, targets, compiled)


def step_of(network: Method, images: torch.Tensor, targets: torch.Tensor, compiled: bool = False) -> Step:
    """Return a training step of `crossx fit` on a batch that is already on the device."""
    device = images.device
    network.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(network, OptimConfig(lr=0.001))
    objective = torch.compile(network.objective, fullgraph=True) if compiled else network.objective
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective(images, targets).loss
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


def candidates(peers: list[Path]) -> dict[str, Callable[..., Step]]:
    """Return name -> function that builds a step of (images, targets)."""
    found: dict[str, Callable[..., Step]] = {"plain": partial(our_step, "plain", {}, False, False)}
    for statistics in ("map", "strided", "pooled"):
        name = "crossx" if statistics == "map" else f"crossx, {statistics}"
        found[name] = partial(our_step, "crossx", {"merged_statistics": statistics}, False, False)
    found["crossx, recompute"] = partial(our_step, "crossx", {}, True, False)
    if torch.cuda.is_available():
        found["plain, compiled"] = partial(our_step, "plain", {}, False, True)
        found["crossx, compiled"] = partial(our_step, "crossx", {}, False, True)
    for root in peers:
        found[Peer.load(root).name] = partial(peer_step, root)
    return found


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return torch.randn(size, 3, SIZE, SIZE).to(device), torch.randint(CLASSES, (size,)).to(device)


def peak_memory(build: Callable[..., Step], size: int) -> int:
    """Return the peak bytes of two steps; must run in a separate process."""
    step = build(*batch(size))
    for _ in range(2):
        step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verdicts(
    time: Mapping[str, dict[str, Ratio]], memory: Mapping[str, float], device: str
) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name, reference, longest, largest in REACH[device]:
        if reference not in memory:
            continue
        if longest is not None:
            ratio = time[reference][name].median
            found.append({"what": f"time of {name} / {reference}", "ratio": ratio, "reach": longest})
        if largest is not None:
            ratio = memory[name] / memory[reference]
            found.append({"what": f"peak memory of {name} / {reference}", "ratio": ratio, "reach": largest})
    return found


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = parser(__doc__, "training_step", runs=9, peer=True)
    options.add_argument("--batch-size", type=int, default=32 if device == "cuda" else 8)
    arguments = options.parse_args()
    builders = candidates(arguments.peer_root)

    peaks: dict[str, list[int]] = {name: [] for name in builders}
    for _ in range(PROCESSES):
        for name, build in builders.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name].append(pool.apply(peak_memory, (build, arguments.batch_size)))
    memory = {name: median(found) for name, found in peaks.items()}
    images, targets = batch(arguments.batch_size)
    timings = interleave({name: build(images, targets) for name, build in builders.items()}, arguments.runs)
    against = {name: ratios(timings, name) for name in ("plain", "released") if name in timings}

    rows = [
        [
            name,
            f"{timing.median:.2f}",
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
    write(
        arguments.output,
        {
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
