"""Communication in a training step of Cross-X on several processes: volume, cost, and prediction for more processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py                      # two processes on the CPU, gloo
    python benchmarks/scaling.py                                        # all GPUs of this machine, NCCL
    python benchmarks/scaling.py --bandwidth 12.5 --latency 20          # GB/s and us of a network of your choice

Bytes are counted by recording every collective of one step. The script times in turn: a step of one process while the
others are idle, the same step in all processes without communication, the step with DDP, and only the collectives. The
model of the step time for W processes with the same batch size each is that of a ring:

    T(W) = T_together + T_small(W) + (1 - overlap) T_gradients(W)
    T_gradients(W) = 2 (W - 1) (bytes / (W bandwidth) + buckets latency)
    T_small(W) = 2 (W - 1) small latency

The numbers of buckets and small collectives are the counted ones. Unless given, bandwidth and latency are fitted to the
times of the collectives, and the overlap of gradient communication and backward pass is fitted to the step with DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import crossx
from crossx.training.config import OptimConfig
from crossx.training.optim import build_optimizer
from harness import Timing, interleave, parser, ratios, table, write

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CLASSES = 200


class Objective(nn.Module):
    """The objective as ``forward``, the only method that DDP hooks into."""

    def __init__(self, method: crossx.Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            return self.method.objective(images, targets).loss


def stepper(objective: nn.Module, method: nn.Module, arguments: argparse.Namespace) -> Callable[[], None]:
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (arguments.batch_size,), device=DEVICE)
    optimizer = build_optimizer(method, OptimConfig(lr=0.001))  # type: ignore[arg-type]

    def step() -> None:
        for _ in range(arguments.steps):
            optimizer.zero_grad()
            objective(images, targets).backward()
            optimizer.step()

    return step


@contextmanager
def recorded(model: DistributedDataParallel) -> Iterator[dict[str, list[int]]]:
    """Record the bytes of each gradient bucket and of each all-reduce in the losses."""
    found: dict[str, list[int]] = {"gradients": [], "losses": []}
    all_reduce = distributed.all_reduce

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations that are strings
        found["gradients"].append(bucket.buffer().nbytes)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["losses"].append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    model.register_comm_hook(None, hook)
    with mock.patch.object(distributed, "all_reduce", count):
        yield found


def alone(step: Callable[[], None]) -> None:
    """Run a step as a single process, without communication."""
    with mock.patch.object(distributed, "is_initialized", return_value=False):
        step()


def measure(rank: int, port: int, arguments: argparse.Namespace, folder: str) -> None:
    """Run on every rank; the first one writes the results."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(0)
    if CUDA:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group("nccl" if CUDA else "gloo", rank=rank, world_size=arguments.processes)
    method = crossx.create_method("crossx", backbone=arguments.backbone, num_classes=CLASSES)
    method.to(device=DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    local = stepper(Objective(method), method, arguments)
    alone(local)

    counted = DistributedDataParallel(Objective(method))
    step = stepper(counted, method, argparse.Namespace(**{**vars(arguments), "steps": 1}))
    step()  # DDP rebuilds its buckets after the first step
    with recorded(counted) as exchanged:
        step()
    del counted, step
    parallel = stepper(DistributedDataParallel(Objective(method)), method, arguments)
    buckets = [torch.zeros(size // 4, device=DEVICE) for size in exchanged["gradients"]]
    small = torch.zeros(1, device=DEVICE)

    def gradients() -> None:
        for bucket in buckets:
            distributed.all_reduce(bucket)

    def small_ones() -> None:
        for _ in range(100):
            distributed.all_reduce(small)

    def together(candidate: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            distributed.barrier()
            candidate()
            if CUDA:
                torch.cuda.synchronize()
            distributed.barrier()

        return run

    candidates = {
        "one": together(lambda: alone(local) if rank == 0 else None),
        "together": together(lambda: alone(local)),
        "parallel": together(parallel),
        "gradients": together(gradients),
        "small": together(small_ones),
    }
    timings = interleave(candidates, arguments.runs, warmup=2)
    if rank == 0:
        norms = [m.num_features for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        exchanged["buffers"] = [buffer.nbytes for buffer in method.buffers()]
        exchanged["synchronised batch norm"] = [4 * n for c in norms for n in (2 * c + 1, 2 * c)]
        seconds = {name: timing.seconds for name, timing in timings.items()}
        Path(folder, "found.json").write_text(json.dumps({"exchanged": exchanged, "seconds": seconds}))
    distributed.barrier()
    distributed.destroy_process_group()


class Model:
    """The model of the module docstring.

    Args:
        step: Seconds of a step of all processes without communication.
        exchanged: Bytes of each collective.
        latency: Seconds.
        bandwidth: Bytes per second.
        overlap: Fraction of the gradient communication that the backward pass hides.
    """

    def __init__(
        self, step: float, exchanged: dict[str, list[int]], latency: float, bandwidth: float, overlap: float
    ) -> None:
        self.step = step
        self.exchanged = exchanged
        self.latency = latency
        self.bandwidth = bandwidth
        self.overlap = overlap

    def gradients(self, processes: int) -> float:
        sizes = self.exchanged["gradients"]
        hops = 2 * (processes - 1)
        return hops * (sum(sizes) / processes / self.bandwidth + len(sizes) * self.latency)

    def small(self, processes: int) -> float:
        # the buffers are one message; all ranks wait for the sums of the losses
        return 2 * (processes - 1) * (len(self.exchanged["losses"]) + 1) * self.latency

    def __call__(self, processes: int) -> float:
        return self.step + self.small(processes) + (1 - self.overlap) * self.gradients(processes)


def main() -> None:
    options = parser(__doc__, "scaling", runs=15)
    options.add_argument("--backbone", default="resnet50" if CUDA else "resnet18")
    options.add_argument("--image-size", type=int, default=448 if CUDA else 160)
    options.add_argument("--batch-size", type=int, default=32 if CUDA else 4, help="per process")
    options.add_argument("--processes", type=int, default=torch.cuda.device_count() if CUDA else 2)
    options.add_argument("--steps", type=int, default=10 if CUDA else 1, help="steps per measurement")
    options.add_argument("--bandwidth", type=float, help="GB/s of a link (default: fitted)")
    options.add_argument("--latency", type=float, help="microseconds per message (default: fitted)")
    options.add_argument(
        "--train-images", type=int, default=5394, help="images per epoch (default: 5394, as in CUB)"
    )
    arguments = options.parse_args()
    count = arguments.processes
    if count < 2:
        options.error("--processes must be at least 2; if there are GPUs, each needs its own.")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        multiprocessing.spawn(measure, (port, arguments, folder), nprocs=count)
        found = json.loads(Path(folder, "found.json").read_text())
    timings = {name: Timing(tuple(seconds)) for name, seconds in found["seconds"].items()}
    exchanged: dict[str, list[int]] = found["exchanged"]

    print(f"{arguments.backbone}, {arguments.image_size} px, {arguments.batch_size} images per process\n")
    rows = [
        [name, len(sizes), f"{sum(sizes) / 1e6:.4f}", f"{max(sizes) / 1e6:.4f}"]
        for name, sizes in exchanged.items()
    ]
    print(table(["communicated per step", "tensors", "MB", "largest"], rows))

    steps = arguments.steps
    one, together, parallel = (timings[name].median / steps for name in ("one", "together", "parallel"))
    hops = 2 * (count - 1)
    latency = timings["small"].median / 100 / hops
    gradients = exchanged["gradients"]
    transfer = timings["gradients"].median / hops - len(gradients) * latency
    bandwidth = sum(gradients) / count / transfer
    fitted = Model(together, exchanged, latency, bandwidth, 0.0)
    pairs = zip(timings["parallel"].seconds, timings["together"].seconds, strict=True)
    added = statistics.median(with_ddp - without for with_ddp, without in pairs) / steps
    overlap = 1 - (added - fitted.small(count)) / fitted.gradients(count)
    over = ratios(timings, "together")
    rows = [
        ["one process, the others at rest", f"{1e3 * one:.2f}", over["one"]],
        ["all at once, no exchange", f"{1e3 * together:.2f}", over["together"]],
        ["all under DDP", f"{1e3 * parallel:.2f}", over["parallel"]],
        ["only gradients", f"{1e3 * timings['gradients'].median:.2f}", ""],
        ["one small message", f"{10 * timings['small'].median:.3f}", ""],
    ]
    print("\n" + table([f"{count} processes", "ms per step", "time / no communication"], rows))
    bounds = [Model(together, exchanged, latency, bandwidth, hidden)(count) for hidden in (1.0, 0.0)]
    print(f"\nthe model's step: {1e3 * bounds[0]:.2f} ms with all gradient communication hidden,")
    print(f"{1e3 * bounds[1]:.2f} ms with none; measured {1e3 * parallel:.2f} ms;")
    print(f"hidden in the median round: {overlap:.0%}")

    hidden = min(1.0, max(0.0, overlap))
    if arguments.bandwidth is not None or arguments.latency is not None:
        bandwidth = arguments.bandwidth * 1e9 if arguments.bandwidth is not None else bandwidth
        latency = arguments.latency * 1e-6 if arguments.latency is not None else latency
    print(f"\nthe model with {bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.1f} us, {hidden:.0%} hidden:")
    model, exposed = (Model(together, exchanged, latency, bandwidth, share) for share in (hidden, 0.0))
    predictions = [
        {
            "processes": n,
            "ms": 1e3 * model(n),
            "efficiency": together / model(n),
            "efficiency_without_overlap": together / exposed(n),
            "steps_an_epoch": -(-arguments.train_images // (n * arguments.batch_size)),
        }
        for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    headers = ["processes", "ms per step", "efficiency", "without overlap", "steps per epoch"]
    rows = [
        [p["processes"], f"{p['ms']:.2f}", f"{p['efficiency']:.1%}", f"{p['efficiency_without_overlap']:.1%}",
         p["steps_an_epoch"]] for p in predictions
    ]  # fmt: skip
    print(table(headers, rows))
    write(
        arguments.output,
        {
            "arguments": {key: value for key, value in vars(arguments).items() if key != "output"},
            "backend": "nccl" if CUDA else "gloo",
            "exchanged_bytes": {
                name: {"tensors": len(sizes), "sum": sum(sizes), "largest": max(sizes)}
                for name, sizes in exchanged.items()
            },
            "timings": {name: timing.to_json() for name, timing in timings.items()},
            "over_no_exchange": {name: vars(over[name]) for name in ("one", "parallel")},
            "model_s": {"all_hidden": bounds[0], "none_hidden": bounds[1], "measured": parallel},
            "overlap": overlap,
            "latency_s": latency,
            "bandwidth_bytes_per_s": bandwidth,
            "predictions": predictions,
        },
    )


if __name__ == "__main__":
    main()
