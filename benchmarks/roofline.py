"""Arithmetic and memory traffic of Cross-X by component, and the bound on its time that follows.

    python benchmarks/roofline.py

Images of 448 x 448, ResNet-50, P = 2, 200 classes, float32 on the CPU, channels last; inference of one image, and a
training step of eight, reported per image. Components: trunk, gates (with shortcut and activation over the parts),
merge, heads (with pooling and, in training, the losses). FLOPs are those that torch.utils.flop_counter counts in the
operators that actually run: convolutions and matrix products, two per multiply-add. Bytes are the sizes of the
operators' inputs and outputs, without views: the traffic without fusion and caches. The minimal traffic is the
parameters, the image and the logits, each once.

Inference is counted with the merge from nine means per channel, as it runs, and on full maps, as in the released code.
The bound of a component is the larger of two times: FLOPs divided by the measured speed of a matrix product, and bytes
divided by that of a copy, once for the traffic without fusion and once for the minimal traffic.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from crossx.layers import OSME, ResidualOSME, global_pool
from crossx.methods import CrossX, create_method
from harness import interleave, parser, table, write

CLASSES, SIZE, TRAINING_BATCH = 200, 448, 8
PARTS = ("trunk", "gates", "merge", "heads")
MATRIX, FLOATS = 2048, 2**26
"""Side of the matrices and length of the vector that the peaks are measured with."""


@dataclass
class Cost:
    """FLOPs and bytes read and written."""

    flops: int = 0
    bytes: int = 0


class Ledger(TorchDispatchMode):
    """Adds the cost of each operator to the running component."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "heads"
        self.costs: dict[str, Cost] = defaultdict(Cost)

    def enter(self, part: str) -> None:
        self.part = part

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view:
            cost = self.costs[self.part]
            cost.bytes += sum(size_of(leaf) for leaf in tree_leaves((args, kwargs, result)))
            if count := flop_registry.get(function.overloadpacket):
                cost.flops += count(*args, **kwargs, out_val=result)
        return result


class Stopwatch:
    """Adds the elapsed time to the running component."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.part, self.since = "heads", time.perf_counter()

    def enter(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now


def size_of(value: object) -> int:
    """Return the bytes of a tensor's memory; expanded dimensions count once."""
    if not isinstance(value, Tensor):
        return 0
    return value.element_size() * prod(
        size for size, stride in zip(value.shape, value.stride(), strict=True) if stride
    )


@contextmanager
def watched(method: CrossX, enter: Callable[[str], None], full_maps: bool) -> Iterator[None]:
    """Call ``enter`` with the name of each component when it starts."""
    merge: Any = method.merge
    original = merge.pooled

    def pooled(previous: Tensor, last: Tensor) -> Tensor:
        enter("merge")
        features = global_pool(merge(previous, last), "avg") if full_maps else original(previous, last)
        enter("heads")
        return features

    def begin(part: str, *_: object) -> None:
        enter(part)

    hooks = [
        method.backbone.register_forward_pre_hook(partial(begin, "trunk")),
        method.backbone.register_forward_hook(partial(begin, "heads")),
    ]
    for block in method.backbone.modules():
        for slot in block.children():
            if isinstance(slot, ResidualOSME):
                # the block's shortcut and activation come after the slot, over all parts
                hooks.append(slot.register_forward_pre_hook(partial(begin, "gates")))
                hooks.append(block.register_forward_hook(partial(begin, "trunk")))
    merge.pooled = pooled
    try:
        yield
    finally:
        del merge.pooled
        for hook in hooks:
            hook.remove()


def count_inference(method: CrossX, images: Tensor, full_maps: bool) -> dict[str, Cost]:
    ledger = Ledger()
    # not inference_mode: its convolution operators are unknown to the FLOP counter
    with torch.no_grad(), watched(method.eval(), ledger.enter, full_maps), ledger:
        method(images)
    return {part: ledger.costs[part] for part in PARTS}


def count_training(method: CrossX, images: Tensor) -> dict[str, Cost]:
    """Count a forward pass by component and a backward pass in total, per image of ``TRAINING_BATCH``."""
    ledger = Ledger()
    batch = images.repeat(TRAINING_BATCH, 1, 1, 1)
    targets = torch.zeros(TRAINING_BATCH, dtype=torch.long)
    with watched(method.train(), ledger.enter, False), ledger:
        loss = method.objective(batch, targets).loss
        ledger.enter("backward")
        loss.backward()
    costs = {part: ledger.costs[part] for part in (*PARTS, "backward")}
    return {part: Cost(c.flops // TRAINING_BATCH, c.bytes // TRAINING_BATCH) for part, c in costs.items()}


def least_bytes(method: CrossX, images: Tensor) -> dict[str, int]:
    """Return component -> unavoidable bytes: parameters and statistics, the image, the logits."""
    gates = sum(state_bytes(module) for module in method.modules() if isinstance(module, OSME))
    assert method.merge is not None
    return {
        "trunk": state_bytes(method.backbone) - gates + size_of(images),
        "gates": gates,
        "merge": state_bytes(method.merge),
        "heads": state_bytes(method.heads) + 4 * CLASSES * len(images),
    }


def state_bytes(module: nn.Module) -> int:
    return sum(size_of(tensor) for tensor in module.state_dict().values())


def time_inference(method: CrossX, images: Tensor, full_maps: bool, runs: int) -> dict[str, float]:
    """Return component -> median of its seconds."""
    rounds = []
    with torch.inference_mode():
        for _ in range(runs + 2):
            watch = Stopwatch()
            with watched(method.eval(), watch.enter, full_maps):
                method(images)
            watch.enter("end")
            rounds.append(watch.seconds)
    return {part: median(seconds[part] for seconds in rounds[2:]) for part in PARTS}


def peaks(runs: int) -> dict[str, float]:
    """Return FLOP/s of a matrix product and bytes/s of a copy (read and written), at the current threads."""
    left, right = torch.randn(2, MATRIX, MATRIX)
    source = torch.randn(FLOATS)
    target = torch.empty_like(source)
    timings = interleave(
        {"gemm": lambda: torch.mm(left, right), "copy": lambda: target.copy_(source)}, runs, warmup=2
    )
    return {
        "flops_per_s": 2 * MATRIX**3 / min(timings["gemm"].seconds),
        "bytes_per_s": 2 * size_of(source) / min(timings["copy"].seconds),
    }


def bound(flops: int, moved: int, peak: Mapping[str, float]) -> float:
    return max(flops / peak["flops_per_s"], moved / peak["bytes_per_s"])


def main() -> None:
    arguments = parser(__doc__, "roofline", runs=15).parse_args()
    torch.manual_seed(0)
    method = create_method("crossx", backbone="resnet50", num_classes=CLASSES)
    assert isinstance(method, CrossX)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(1, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    peak = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        peak[count] = peaks(arguments.runs)
        gemm, copy = peak[count]["flops_per_s"] / 1e9, peak[count]["bytes_per_s"] / 1e9
        print(f"{count} threads: {gemm:.0f} GFLOP/s, {copy:.1f} GB/s, ridge {gemm / copy:.1f} FLOP/byte")
    least = least_bytes(method, images)

    headers = ["", "part", "GFLOP", "MB", "FLOP/byte", "least MB", "bound ms", "least bound ms", "ms"]
    rows, results = [], {}
    for name, full_maps in (("nine means", False), ("full maps", True)):
        costs = count_inference(method, images, full_maps)
        seconds = time_inference(method, images, full_maps, arguments.runs)
        results[f"inference, {name}"] = {}
        for part, cost in costs.items():
            entry = {
                **vars(cost),
                "intensity": cost.flops / cost.bytes,
                "least_bytes": least[part],
                "bound_s": bound(cost.flops, cost.bytes, peak[threads]),
                "least_bound_s": bound(cost.flops, least[part], peak[threads]),
                "measured_s": seconds[part],
            }
            results[f"inference, {name}"][part] = entry
            rows.append(
                [
                    f"inference, {name}", part, f"{cost.flops / 1e9:.3f}", f"{cost.bytes / 1e6:.1f}",
                    f"{entry['intensity']:.2f}", f"{least[part] / 1e6:.1f}", f"{entry['bound_s'] * 1e3:.2f}",
                    f"{entry['least_bound_s'] * 1e3:.2f}", f"{seconds[part] * 1e3:.2f}",
                ]
            )  # fmt: skip
    training = count_training(method, images)
    results["training step"] = {part: vars(cost) for part, cost in training.items()}
    for part, cost in training.items():
        rows.append(
            [
                "training step", part, f"{cost.flops / 1e9:.3f}", f"{cost.bytes / 1e6:.1f}",
                f"{cost.flops / cost.bytes:.2f}", "", "", "", "",
            ]
        )  # fmt: skip
    print(table(headers, rows))
    write(arguments.output, {"image_size": SIZE, "peaks": peak, "parts": results})


if __name__ == "__main__":
    main()
