"""Inference of Cross-X compared with a plain ResNet-50 and with other implementations, on several backends.

    python benchmarks/inference.py --peer-root DIR

DIR is a clone of https://github.com/cswluo/CrossX or Hawkeye, run as published: float32, eager, contiguous; Cross-X
then has the same weights. ResNet-50, 448 x 448, P = 2, 200 classes. Backends whose packages are not installed are
skipped: onnxruntime and openvino need the package of that name, onnx and onnxscript. The effect of bfloat16 on the
accuracy of a trained network is measured by inference_precision.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from backends import BACKENDS, Backend, Run, run_torch
from crossx.evaluation.device import select_device
from crossx.methods import create_method
from crossx.released import build_released
from harness import Timing, interleave, parser, ratios, set_tf32, synchronize, table, write
from parity import difference, randomise_norms
from peers import Peer

CLASSES, SIZE = 200, 448
AS_PUBLISHED = BACKENDS[0]
PAUSE = 0.02
GPU_REPEATS = 10
"""Batches per timed round on a GPU."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Candidate:
    """A network on a backend.

    Attributes:
        network: ``plain``, ``crossx`` or the name of another implementation.
        backend: The backend that runs it.
        run: Function that runs a batch.
        difference: Largest difference of the logits from the reference, divided by the reference's largest logit. The
            reference of Cross-X is another implementation, if there is one, otherwise the network in eager float32.
        peak_bytes: GPU memory that a batch needs in addition to weights and images; None on the CPU.
    """

    network: str
    backend: Backend
    run: Run
    difference: float
    peak_bytes: int | None

    def __str__(self) -> str:
        return f"{self.network}, {self.backend}"


def build_networks(peer_roots: Iterable[Path], backbone: str = "resnet50") -> dict[str, nn.Module]:
    """Return name -> network in evaluation mode; Cross-X gets the weights of the peers, if there are any."""
    torch.manual_seed(0)
    plain = timm.create_model(backbone, num_classes=CLASSES)
    peers = {peer.name: peer.network(CLASSES) for peer in map(Peer.load, peer_roots)}
    weights: nn.Module = next(
        iter(peers.values()), create_method("crossx", backbone=backbone, num_classes=CLASSES)
    )
    randomise_norms(plain)
    randomise_norms(weights)
    for network in peers.values():
        network.load_state_dict(weights.state_dict())
    ours = build_released(weights.state_dict(), "max", True, Path("peer")) if peers else weights
    return {name: network.eval() for name, network in {"plain": plain, "crossx": ours, **peers}.items()}


def prepare(
    networks: Mapping[str, nn.Module], backends: Iterable[Backend], images: Tensor
) -> Iterator[Candidate]:
    """Build plain and Cross-X on each backend, and the other implementations as published."""
    logits = {name: run_torch(network, images)(images) for name, network in networks.items()}
    crossx_reference = list(logits.values())[-1]
    for backend in backends:
        for name, network in networks.items():
            if name in ("plain", "crossx") or backend is AS_PUBLISHED:
                run = backend.prepare(network, images)
                reference = logits["plain"] if name == "plain" else crossx_reference
                yield Candidate(
                    name, backend, run, difference(run(images), reference), peak_memory(run, images)
                )


def peak_memory(run: Run, images: Tensor) -> int | None:
    if images.device.type != "cuda":
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(images)
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def best(candidates: Iterable[Candidate], timings: Mapping[str, Timing]) -> Candidate:
    return min(candidates, key=lambda candidate: timings[str(candidate)].median)


def comparisons(
    candidates: list[Candidate], timings: Mapping[str, Timing], on_gpu: bool
) -> Iterator[tuple[Candidate, Candidate, float]]:
    """Yield the pairs to compare, with the target for the ratio of their times."""
    plain = [candidate for candidate in candidates if candidate.network == "plain"]
    ours = [candidate for candidate in candidates if candidate.network == "crossx"]
    others = [candidate for candidate in candidates if candidate not in plain + ours]
    for own, other in zip(ours, plain, strict=True):
        yield own, other, 1.08 if on_gpu or own.backend.name == "eager" else 1.10
    if not (on_gpu or any(str(c.backend).startswith("eager fp32") for c in plain)):
        return
    precisions = [[c for c in ours if c.backend.precision == precision] for precision in ("fp32", "bf16")]
    fastest = [best(group, timings) for group in precisions if group]
    if on_gpu:
        yield from ((own, other, 1 / 5) for other in others for own in fastest)
        return
    own_eager, plain_eager = (
        best([c for c in group if c.backend.name == "eager" and c.backend.precision == "fp32"], timings)
        for group in (ours, plain)
    )
    yield own_eager, plain_eager, 1.08
    yield from ((own_eager, other, 1 / 1.8) for other in others)
    yield from ((own, plain_eager, 1 / 1.8) for own in fastest)


def verdicts(
    candidates: list[Candidate], timings: Mapping[str, Timing], on_gpu: bool
) -> Iterator[dict[str, Any]]:
    for own, other, reach in comparisons(candidates, timings, on_gpu):
        ratio = ratios(timings, str(other))[str(own)]
        yield {"what": f"time of {own} / {other}", **vars(ratio), "reach": reach}
    differences = [
        c.difference for c in candidates if c.network == "crossx" and c.backend.precision == "fp32"
    ]
    if differences and not on_gpu:
        yield {
            "what": "difference of Cross-X's fp32 logits",
            "median": max(differences),
            "reach": TOLERANCE,
        }


def measure(
    networks: Mapping[str, nn.Module], backends: Iterable[Backend], images: Tensor, runs: int
) -> dict[str, Any]:
    """Time all candidates on one batch, print the results and return them."""
    torch.compiler.reset()
    batch, on_gpu = len(images), images.device.type == "cuda"
    fitting = [backend for backend in backends if backend.fits(images.device, batch)]
    candidates = list(prepare(networks, fitting, images))
    timings = interleave(
        {str(c): partial(c.run, images) for c in candidates},
        runs,
        2,
        PAUSE,
        repeats=GPU_REPEATS if on_gpu else 1,
    )
    eager = best([c for c in candidates if c.network == "plain" and c.backend.name == "eager"], timings)
    over_plain = ratios(timings, str(eager))
    rows = []
    for c in candidates:
        seconds = timings[str(c)].median
        memory = "" if c.peak_bytes is None else f"{c.peak_bytes / 2**20:.0f}"
        rows.append(
            [
                c,
                f"{seconds * 1e3:.1f}",
                f"{batch / seconds:.1f}",
                over_plain[str(c)],
                f"{c.difference:.1e}",
                memory,
            ]
        )
    headers = ["network, backend", "ms", "images/s", f"time / {eager}", "difference", "peak MiB"]
    print(f"\nbatch {batch}\n" + table(headers, rows))
    reached = [
        {**row, "reached": row["median"] <= row["reach"]} for row in verdicts(candidates, timings, on_gpu)
    ]
    for row in reached:
        print(f"{row['what']}: {row['median']:.3g}, target {row['reach']:.3g}: {row['reached']}")
    return {
        "batch": batch,
        "candidates": {
            str(c): {
                **timings[str(c)].to_json(),
                "images_per_second": batch / timings[str(c)].median,
                "difference": c.difference,
                "peak_bytes": c.peak_bytes,
            }
            for c in candidates
        },
        "reach": reached,
    }


def main() -> None:
    options = parser(__doc__, "inference", runs=15, peer=True)
    options.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    options.add_argument(
        "--batches", help="batch sizes, comma-separated (default: 1,8 on a CPU, 1,64 on a GPU)"
    )
    options.add_argument(
        "--backends", default="eager,compile,onnxruntime,openvino", help="default: %(default)s"
    )
    options.add_argument("--precision", default="fp32,bf16", help="default: %(default)s")
    options.add_argument("--size", type=int, default=SIZE, help="pixels (default: %(default)s)")
    options.add_argument("--backbone", default="resnet50", help="default: %(default)s")
    options.add_argument("--tf32", action="store_true", help="allow TF32 on a GPU, in fp32")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    set_tf32(arguments.tf32)
    device = select_device(arguments.device)
    wanted = [
        backend
        for backend in BACKENDS
        if backend.name in arguments.backends.split(",")
        and backend.precision in arguments.precision.split(",")
    ]
    for backend in wanted:
        if backend.missing():
            print(f"{backend} is skipped: {', '.join(backend.missing())} not installed")
    backends = [backend for backend in wanted if not backend.missing()]
    networks = {
        name: network.to(device)
        for name, network in build_networks(arguments.peer_root, arguments.backbone).items()
    }
    batches = arguments.batches or ("1,64" if device.type == "cuda" else "1,8")
    size = arguments.size
    measured = [
        measure(networks, backends, torch.randn(int(batch), 3, size, size, device=device), arguments.runs)
        for batch in batches.split(",")
    ]
    write(
        arguments.output,
        {"device": device.type, "image_size": size, "tf32": arguments.tf32, "batches": measured},
    )


if __name__ == "__main__":
    main()
