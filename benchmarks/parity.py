"""Compare Cross-X with the released code from the same random weights: logits, losses, gradients and training.

    python benchmarks/parity.py --peer-root DIR

DIR is a clone of https://github.com/cswluo/CrossX. For ResNet-50 and SENet-50, GMP (the settings of CUB) and GAP (those
of Cars) on stage L-1, P = 2 and 3, both implementations get the same weights and images. The script compares

- the logits of each head and the prediction, in evaluation mode, at 448 x 448;
- each weighted term of the objective and their sum, in training mode;
- the gradient of every parameter;
- the change of every weight and every running statistic of a batch norm after three SGD steps.

The released code is called as in its training loop, with the C3S weights and the learning rate of its
initialization.py; crossx takes both from its ``_released`` recipe and its optimiser from ``build_optimizer``. The
released networks always resize to 28 x 28, the map size at 448 px. To train on smaller images, which takes a twelfth of
the time, this number is replaced by the map size at ``--train-size``.

The difference between two tensors is the largest absolute difference divided by the largest absolute value of the
released code's tensor. For several tensors, it is that of the worst one; for gradients and changes, the norm of all
differences divided by the norm of all values is given as well. Rounding errors in float32 grow from step to step. The
comparison is therefore repeated in float64, and the released code in float32 is compared with itself in float64: a
difference no larger than that one is rounding.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.methods.crossx import HEADS
from crossx.released import build_released, convert_released
from crossx.training.config import Config
from crossx.training.optim import build_optimizer
from harness import RESULTS, table, write
from peers import terms

NETWORKS = {
    ("resnet50", "max"): "crossxresnetmix",
    ("resnet50", "avg"): "crossxresnetavg",
    ("senet50", "max"): "crossxsenetmix",
    ("senet50", "avg"): "crossxsenetavg",
}
RECIPES = {"max": "cub", "avg": "cars"}
DATASETS = {"max": "cubbirds", "avg": "stcars"}
CLASSES, SIZE, BATCH, STEPS = 200, 448, 2, 3
STRIDE = 16
"""Of stage L-1."""
MOVED = ("gradients", "weights", "statistics")

Batch: TypeAlias = tuple[Tensor, Tensor]
Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """Results of one implementation.

    Attributes:
        logits: Logits of each head and of the prediction, for one image in evaluation mode.
        terms: The objective ``loss`` and its weighted terms, for the first batch in training mode.
        gradients: Gradient of ``loss`` with respect to each parameter.
        weights: Change of each weight from the first step to the last.
        statistics: Change of each running mean and variance.
    """

    logits: Tensors
    terms: Tensors
    gradients: Tensors
    weights: Tensors
    statistics: Tensors


def randomise_norms(network: nn.Module) -> None:
    """Randomise batch norms: as the identity, they would hide statistics that are not copied."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.1)


def shrink_stages(network: nn.Module) -> None:
    """Scale down the residuals of the blocks, to the size in a trained network.

    At random initialisation they are so large that the first step at the released learning rate changes the logits by
    tens, and later steps would compare saturated softmaxes.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("downsample.1.weight"):
            nn.init.constant_(parameter, 0.2)
        elif name.endswith(".bn3.weight"):
            nn.init.constant_(parameter, 0.1)
        elif name.endswith((".bn3.bias", "downsample.1.bias")):
            nn.init.normal_(parameter, 0, 0.01)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference divided by the largest released value; 0 if both tensors are zero."""
    largest = (ours - theirs).abs().max()
    return (largest / theirs.abs().max()).item() if largest else 0.0


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    if ours.keys() != theirs.keys():
        sys.exit(f"only in one of both: {sorted(ours.keys() ^ theirs.keys())}")
    return {name: difference(ours[name].double(), theirs[name].double()) for name in ours}


@torch.inference_mode()
def predict(network: nn.Module, heads: Callable[[Tensor], Tensors], images: Tensor) -> Tensors:
    network.eval()
    logits = heads(images)
    return {**logits, "prediction": logits["last"] + logits["previous"] + logits["merged"]}


def train(
    network: nn.Module,
    objective: Callable[[Tensor, Tensor], Tensors],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
) -> tuple[Tensors, Tensors, Tensors]:
    """Return the terms and gradients of the first batch, and the change of the state over all batches."""
    network.train()
    # the initial state is float32, also for float64
    start = {name: value.to(torch.float32, copy=True) for name, value in network.state_dict().items()}
    first: Tensors = {}
    gradients: Tensors = {}
    for images, targets in batches:
        optimizer.zero_grad()
        found = objective(images, targets)
        found["loss"].backward()
        if not first:
            first = {name: term.detach() for name, term in found.items()}
            gradients = {
                name: parameter.grad
                for name, parameter in network.named_parameters()
                if parameter.grad is not None
            }
        optimizer.step()
    moved = {name: value - start[name] for name, value in network.state_dict().items()}
    return first, gradients, moved


def outcome(logits: Tensors, terms: Tensors, gradients: Tensors, moved: Tensors) -> Outcome:
    statistics = {name: value for name, value in moved.items() if "running_" in name}
    weights = {name: moved[name] for name in gradients}
    return Outcome(logits, terms, gradients, weights, statistics)


def resizing_to(module: Any, size: int) -> AbstractContextManager[Any]:
    """Replace the released networks' ``F`` so that they resize to the map of ``size`` instead of that of 448."""
    functional = SimpleNamespace(interpolate=lambda maps, _: F.interpolate(maps, size // STRIDE))
    return mock.patch.object(module, "F", functional)


def run_released(
    module: Any,
    settings: Sequence[float],
    network: nn.Module,
    num_parts: int,
    image: Tensor,
    batches: Sequence[Batch],
) -> Outcome:
    """Run the released code; the names of its weights are converted to those of crossx."""
    *gammas, lr, _ = settings
    c3s = [module.RegularLoss(gamma, None, num_parts) for gamma in gammas]

    def objective(images: Tensor, targets: Tensor) -> Tensors:
        found = terms(network(images), targets, c3s)
        return {**found, "loss": torch.stack(list(found.values())).sum()}

    logits = predict(network, lambda images: dict(zip(HEADS, network(images)[:3], strict=True)), image)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    with resizing_to(module, batches[0][0].shape[-1]):
        first, gradients, moved = train(network, objective, optimizer, batches)
    rename = partial(convert_released, num_parts=num_parts)
    named = {name: gradient for name, gradient in rename(gradients).items() if gradient.numel()}
    return outcome(logits, first, named, rename(moved))


def run_crossx(method: Any, recipe: Config, image: Tensor, batches: Sequence[Batch]) -> Outcome:
    method.c3s_weights = dict(zip(HEADS, recipe.model.options["c3s_weights"], strict=True))

    def objective(images: Tensor, targets: Tensor) -> Tensors:
        found = method.objective(images, targets)
        return {**found.terms, "loss": found.loss}

    logits = predict(method, method.head_logits, image)
    return outcome(logits, *train(method, objective, build_optimizer(method, recipe.optim), batches))


def compare(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Return the differences of logits and terms by name, and worst and norm of the others."""
    found: dict[str, Any] = {
        kind: differences(getattr(ours, kind), getattr(theirs, kind)) for kind in ("logits", "terms")
    }
    for kind in MOVED:
        own, other = getattr(ours, kind), getattr(theirs, kind)
        by_name = differences(own, other)
        worst = max(by_name, key=by_name.__getitem__)
        apart = math.hypot(*(torch.dist(own[name].double(), other[name].double()).item() for name in own))
        whole = math.hypot(*(tensor.double().norm().item() for tensor in other.values()))
        found[kind] = {
            "worst": by_name[worst],
            "worst_tensor": worst,
            "tensors": len(by_name),
            "norm": apart / whole,
        }
    return found


def compare_network(network: str, pooling: str, num_parts: int, train_size: int) -> dict[str, Any]:
    """Return the comparisons ``float32``, ``float64`` and the released code's ``float32_to_float64``."""
    name = NETWORKS[network, pooling]
    module: Any = importlib.import_module(name)
    module.device = torch.device("cpu")
    # the released code compares strings by identity
    names = sys.intern(network.removesuffix("50")), DATASETS[pooling]
    settings = importlib.import_module("initialization").init_crossx_params(*names)
    recipe = Config.from_recipe(f"crossx_{RECIPES[pooling]}_{network}_released")
    build = getattr(module, network)
    torch.manual_seed(0)
    peer = build(num_classes=CLASSES, nparts=num_parts)
    randomise_norms(peer)
    shrink_stages(peer)
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    image = torch.randn(1, 3, SIZE, SIZE)
    shape = (BATCH, 3, train_size, train_size)
    batches = [(torch.randn(shape), torch.randint(CLASSES, (BATCH,))) for _ in range(STEPS)]
    found: dict[str, Any] = {"network": network, "pooling": pooling, "num_parts": num_parts}
    single: Outcome | None = None
    for dtype in (torch.float32, torch.float64):
        # the released regularizer fills a matrix of the default dtype
        torch.set_default_dtype(dtype)
        peer = build(num_classes=CLASSES, nparts=num_parts)
        peer.load_state_dict(state)
        same = image.to(dtype), [(images.to(dtype), targets) for images, targets in batches]
        theirs = run_released(module, settings, peer, num_parts, *same)
        del peer
        if single is not None:
            found["float32_to_float64"] = compare(single, theirs)
        single = None if dtype is torch.float64 else theirs
        method = build_released(state, pooling, True, Path(name)).to(dtype)  # type: ignore[arg-type]
        found[str(dtype).removeprefix("torch.")] = compare(run_crossx(method, recipe, *same), theirs)
    torch.set_default_dtype(torch.float32)
    return found


def trained(comparison: Mapping[str, Any], measure: str) -> list[float]:
    return [max(comparison["terms"].values()), *(comparison[kind][measure] for kind in MOVED)]


def show(
    title: str,
    results: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    values: Callable[[Any], Sequence[float]],
) -> None:
    rows = [
        [
            result["network"],
            result["pooling"],
            result["num_parts"],
            *(f"{value:.1e}" for value in values(result)),
        ]
        for result in results
    ]
    print(f"\n{title}\n\n{table(('network', 'L-1', 'P', *columns), rows)}")


def show_all(results: Sequence[Mapping[str, Any]]) -> None:
    show(
        f"Logits of one image of {SIZE} px in evaluation mode, float32, and the worst in float64",
        results,
        (*HEADS, "prediction", "float64"),
        lambda result: [*result["float32"]["logits"].values(), max(result["float64"]["logits"].values())],
    )
    columns = ("terms", *MOVED)
    show(
        f"Terms, gradients, and what {STEPS} steps change, float64, worst tensor",
        results,
        columns,
        lambda result: trained(result["float64"], "worst"),
    )
    show("Float32, norms", results, columns, lambda result: trained(result["float32"], "norm"))
    show(
        "The released code's own float32 and float64, norms",
        results,
        columns,
        lambda result: trained(result["float32_to_float64"], "norm"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-root", required=True, type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "parity.json")
    parser.add_argument("--train-size", type=int, default=128, help="pixels, a multiple of 32 (default: 128)")
    parser.add_argument("--parts", type=int, nargs="+", choices=(2, 3), default=[2, 3], help="P")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS.values(), default=NETWORKS.values())
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.peer_root))
    warnings.simplefilter("ignore", SyntaxWarning)
    cases = [
        (network, pooling, num_parts)
        for (network, pooling), module in NETWORKS.items()
        if module in arguments.networks
        for num_parts in arguments.parts
    ]
    results = []
    for case in cases:
        results.append(compare_network(*case, arguments.train_size))
        print(*case, "done", file=sys.stderr, flush=True)
    show_all(results)
    settings = {"image_size": SIZE, "train_size": arguments.train_size, "batch_size": BATCH, "steps": STEPS}
    write(arguments.output, {**settings, "classes": CLASSES, "results": results})


if __name__ == "__main__":
    main()
