"""Peak of the tensors that are alive in a training step, in float32 and bfloat16, without computing them.

    python benchmarks/step_memory.py --peer-root CrossX

ResNet-50, 448 x 448, batch 8, P = 2, 200 classes, SGD with momentum; the second of two steps. The step runs on fake
tensors, which have sizes but no memory, and those that are alive are added up: the same figures on every machine.
(torch's MemTracker does so, too, but refuses networks that call a layer twice.) The working memory of the kernels and
what allocators waste come on top; training_step.py measures that. Bfloat16 is autocast, with weights, gradients and
momentum in float32, as of `crossx fit`; the released code has no bfloat16, and is run in it as any network would be.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossx.methods import Method, create_method
from crossx.training.config import OptimConfig
from crossx.training.optim import build_optimizer
from harness import parser, table, write
from peers import Peer

CLASSES, SIZE = 200, 448
Objective = Callable[[Tensor, Tensor], Tensor]


class Alive(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, each memory once."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.bytes = self.peak = 0
        for tensor in before:
            self._add(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(memory, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size


def networks(peers: list[Path], backbone: str) -> dict[str, Callable[[], tuple[nn.Module, Objective]]]:
    """Return name -> function that builds a network and its loss."""

    def ours(method: str, recompute: bool = False, **options: Any) -> tuple[nn.Module, Objective]:
        network = create_method(method, backbone=backbone, num_classes=CLASSES, **options)
        if recompute:
            network.backbone.recompute_activations()
        return network, lambda images, targets: network.objective(images, targets).loss

    def theirs(root: Path) -> tuple[nn.Module, Objective]:
        peer = Peer.load(root)
        network = peer.network(CLASSES)
        return network, peer.objective(network)

    found: dict[str, Callable[[], tuple[nn.Module, Objective]]] = {
        "plain": lambda: ours("plain"),
        "crossx": lambda: ours("crossx"),
        "crossx, strided": lambda: ours("crossx", merged_statistics="strided"),
        "crossx, pooled": lambda: ours("crossx", merged_statistics="pooled"),
        "crossx, recompute": lambda: ours("crossx", recompute=True),
    }
    return found | {Peer.load(root).name: lambda root=root: theirs(root) for root in peers}  # type: ignore[misc]


def peak(
    build: Callable[[], tuple[nn.Module, Objective]], bf16: bool, batch: int, size: int
) -> dict[str, int]:
    """Return the bytes before a step (weights, momentum, images) and at its peak."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, objective = build()
        network.train()
        optimizer = (
            build_optimizer(network, OptimConfig(lr=0.001))
            if isinstance(network, Method)
            else torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
        )
        images, targets = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = objective(images, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        state = tree_leaves(list(optimizer.state.values()))
        kept = [*network.state_dict().values(), *(leaf for leaf in state if isinstance(leaf, Tensor)), images]
        with Alive(*kept) as memory:
            before = memory.bytes
            step()
    return {"before": before, "peak": memory.peak}


def show(found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    rows = []
    for name, of in found.items():
        for precision, amounts in of.items():
            ratio = [
                f"{amounts['peak'] / found[other][precision]['peak']:.3f}" if other in found else ""
                for other in ("plain", "released")
            ]
            gib = [f"{amounts[kind] / 2**30:.2f}" for kind in ("before", "peak")]
            rows.append([name, precision, *gib, *ratio])
    return table(["step", "precision", "before, GiB", "peak, GiB", "over plain", "over released"], rows)


def main() -> None:
    options = parser(__doc__, "step_memory", runs=1, peer=True)
    options.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    options.add_argument("--size", type=int, default=SIZE, help="pixels (default: %(default)s)")
    options.add_argument("--backbone", default="resnet50", help="default: %(default)s")
    arguments = options.parse_args()
    found = {
        name: {
            precision: peak(build, precision == "bf16", arguments.batch_size, arguments.size)
            for precision in ("fp32", "bf16")
        }
        for name, build in networks(arguments.peer_root, arguments.backbone).items()
    }
    print(show(found))
    settings = {key: getattr(arguments, key) for key in ("backbone", "size", "batch_size")}
    write(arguments.output, {**settings, "steps": found})


if __name__ == "__main__":
    main()
