"""C3S and CL, forward and backward: share of a training step, scaling, and other implementations.

    python benchmarks/losses.py --peer-root DIR

DIR is a clone of https://github.com/cswluo/CrossX (or Hawkeye). Features and logits have the shapes of Cross-X on
ResNet-50: P = 2 parts of 2048, 1024 and 1024 channels, three heads of 200 classes. The share is relative to a whole
training step at 448 x 448, timed in turn with the losses. Scaling is the exponent e of ``time ~ size ** e`` between
sizes where arithmetic outweighs the fixed cost of a call; 1 is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import crossx
from crossx.losses import c3s_loss, cross_layer_loss
from crossx.training.config import OptimConfig
from crossx.training.optim import build_optimizer
from harness import Timing, interleave, parser, ratios, table, write
from peers import GAMMAS, Peer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS = (2048, 1024, 1024)
CLASSES, PARTS, SIZE = 200, 2, 448
BATCHES = (256, 512, 1024, 2048, 4096)
CLASS_COUNTS = (2000, 4000, 8000, 16000, 32000)
REPEAT = 5
"""Calls that are timed as one."""

Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


def our_loss(features: list[Tensor], logits: list[Tensor]) -> Tensor:
    """Return C3S plus CL, for part features (B, P, C) and logits (B, K) of the heads, that of the last stage first."""
    c3s = sum(gamma * c3s_loss(f, "released") for gamma, f in zip(GAMMAS, features, strict=True))
    return c3s + sum(cross_layer_loss(logits[0], student) for student in logits[1:])


def peer_loss(peer: Peer) -> Loss:
    """Return the same from another implementation, whose CL is part of its training loop."""
    c3s = [peer.regularizer(gamma, PARTS) for gamma in GAMMAS]

    def loss(features: list[Tensor], logits: list[Tensor]) -> Tensor:
        # it changes its lists in place
        parts = [list(f.unbind(1)) for f in features]
        total = sum(regularizer(part) for regularizer, part in zip(c3s, parts, strict=True))
        teacher = F.softmax(logits[0], 1)
        for student in logits[1:]:
            total = total + F.kl_div(F.log_softmax(student, 1), teacher, reduction="sum") / len(student)
        return total

    return loss


def inputs(batch: int, classes: int = CLASSES) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    features = [torch.rand(batch, PARTS, c, device=DEVICE, requires_grad=True) for c in CHANNELS]
    logits = [torch.randn(batch, classes, device=DEVICE, requires_grad=True) for _ in CHANNELS]
    return features, logits


def forward_and_backward(
    loss: Loss, batch: int, classes: int = CLASSES, repeat: int = 1
) -> Callable[[], None]:
    features, logits = inputs(batch, classes)

    def run() -> None:
        for _ in range(repeat):
            torch.autograd.grad(loss(features, logits), [*features, *logits], allow_unused=True)

    return run


def only_c3s(features: list[Tensor], logits: list[Tensor]) -> Tensor:
    return torch.stack([c3s_loss(f) for f in features]).sum()


def only_cl(features: list[Tensor], logits: list[Tensor]) -> Tensor:
    return torch.stack([cross_layer_loss(logits[0], student) for student in logits[1:]]).sum()


def training_step(batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    network = crossx.create_method("crossx", backbone="resnet50", num_classes=CLASSES, c3s_form="released")
    network.to(device=DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(network, OptimConfig(lr=0.001))
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (batch,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = network.objective(images, targets).loss
        loss.backward()
        optimizer.step()

    return step


def exponent(sizes: Sequence[int], timings: dict[str, Timing]) -> float:
    """Return the least-squares slope of log time over log size."""
    x = [math.log(size) for size in sizes]
    y = [math.log(timing.median) for timing in timings.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return rise / sum((a - x_mean) ** 2 for a in x)


def growth(build: Callable[[int], Callable[[], None]], sizes: Sequence[int], runs: int) -> dict[str, Any]:
    timings = interleave({str(size): build(size) for size in sizes}, runs, 3)
    return {
        "seconds": {size: timing.median for size, timing in timings.items()},
        "exponent": exponent(sizes, timings),
    }


def main() -> None:
    options = parser(__doc__, "losses", runs=7, peer=True)
    options.add_argument("--batch-size", type=int, default=32 if DEVICE == "cuda" else 8)
    arguments = options.parse_args()
    batch, runs = arguments.batch_size, arguments.runs

    share = interleave(
        {"step": training_step(batch), "losses": forward_and_backward(our_loss, batch)}, runs, warmup=1
    )
    ratio = ratios(share, "step")["losses"]
    print(
        f"C3S and CL, batch {batch}: {1e3 * share['losses'].median:.2f} ms of {share['step'].median:.3f} s:"
    )
    print(f"{ratio.median:.3%} of a step ({ratio.min:.3%} to {ratio.max:.3%}); target: 1%\n")

    peers = {peer.name: peer_loss(peer) for peer in map(Peer.load, arguments.peer_root)}
    against: dict[str, dict[str, object]] = {}
    rows = []
    for size in (batch, 128, 512):
        expected = our_loss(*inputs(size))
        candidates = {"crossx": forward_and_backward(our_loss, size, repeat=REPEAT)}
        for name, loss in peers.items():
            torch.testing.assert_close(loss(*inputs(size)), expected, rtol=1e-4, atol=1e-4)
            candidates[name] = forward_and_backward(loss, size, repeat=REPEAT)
        timings = interleave(candidates, runs, 2)
        over = ratios(timings, "crossx")
        for name, timing in timings.items():
            rows.append([size, name, f"{1e3 * timing.median / REPEAT:.3f}", over[name]])
        against[str(size)] = {
            name: {"median_s": timing.median / REPEAT, "over_crossx": vars(over[name])}
            for name, timing in timings.items()
        }
    print(table(["batch", "implementation", "ms", "time / crossx"], rows))

    grown = {
        "C3S with the batch": growth(lambda n: forward_and_backward(only_c3s, n), BATCHES, runs),
        "CL with the batch": growth(lambda n: forward_and_backward(only_cl, n, 2000), BATCHES, runs),
        "CL with the classes": growth(lambda n: forward_and_backward(only_cl, 256, n), CLASS_COUNTS, runs),
    }
    print()
    print(
        table(
            ["time of", *(f"x{2**i}" for i in range(len(BATCHES))), "exponent"],
            [
                [name, *(f"{1e3 * s:.2f} ms" for s in found["seconds"].values()), f"{found['exponent']:.2f}"]
                for name, found in grown.items()
            ],
        )
    )
    write(
        arguments.output,
        {
            "batch_size": batch,
            "share_of_step": vars(ratio),
            "timings": {name: timing.to_json() for name, timing in share.items()},
            "implementations": against,
            "growth": grown,
        },
    )


if __name__ == "__main__":
    main()
