"""Other implementations of Cross-X, run as published from the user's own clones."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.methods.crossx import HEADS

GAMMAS = (0.5, 0.25, 0.5)
"""Their weights of C3S on L, L-1 and G for CUB on ResNet-50."""


@dataclass(frozen=True)
class Peer:
    """A clone of https://github.com/cswluo/CrossX (``released``) or https://github.com/Hawkeye-FineGrained/Hawkeye.

    Both run the same network: ResNet-50 with GMP on stage L-1.
    """

    name: str
    module: Any
    regularizer: Callable[[float, int], nn.Module]

    @classmethod
    def load(cls, root: Path) -> Peer:
        sys.path.insert(0, str(root))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            if (root / "crossxresnetmix.py").is_file():
                module = importlib.import_module("crossxresnetmix")
                return cls("released", module, lambda gamma, parts: module.RegularLoss(gamma, None, parts))
            if (root / "model/methods/CrossX.py").is_file():
                # not imported as a package, which would import all other methods and their dependencies
                registry: Any = ModuleType("model.registry")
                registry.MODEL = SimpleNamespace(register=lambda network: network)
                sys.modules.update({"model": ModuleType("model"), "model.registry": registry})
                module = _load(root / "model/methods/CrossX.py")
                loss = _load(root / "model/loss/CrossX_loss.py")
                return cls("hawkeye", module, loss.RegularLoss)
        sys.exit(f"{root}: no clone of CrossX or Hawkeye.")

    def network(self, num_classes: int, num_parts: int = 2) -> nn.Module:
        """Build the implementation's ResNet-50, randomly initialised."""
        # the two resnet50() differ in whether they download ImageNet weights
        network: nn.Module = self.module.ResNet(
            self.module.Bottleneck, [3, 4, 6, 3], nparts=num_parts, meflag=True, num_classes=num_classes
        )
        return network

    def objective(self, network: nn.Module, num_parts: int = 2) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (images, targets) -> loss: cross-entropy, C3S with N x N matrices and CL, as in its training loop."""
        c3s = [self.regularizer(gamma, num_parts) for gamma in GAMMAS]
        return lambda images, targets: torch.stack(list(terms(network(images), targets, c3s).values())).sum()


def terms(outputs: Sequence[Any], targets: Tensor, c3s: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the terms of the objective, with the names of ``crossx.methods.CrossX.objective``.

    Args:
        outputs: Result of the network: the logits of L, L-1 and G, then the list of part features of each.
        targets: int64 (B,).
        c3s: Regularizers of L, L-1 and G, which include their weights.
    """
    logits = dict(zip(HEADS, outputs[:3], strict=True))
    found = {"data": F.cross_entropy(logits["last"] + logits["previous"] + logits["merged"], targets)}
    for name, regularizer, features in zip(HEADS, c3s, outputs[3:], strict=True):
        # the regularizers change the list in place
        found[f"c3s_{name}"] = regularizer(list(features))
    teacher = F.softmax(logits["last"], 1)
    for name in HEADS[1:]:
        divergence = F.kl_div(F.log_softmax(logits[name], 1), teacher, reduction="sum")
        found[f"cross_layer_{name}"] = divergence / len(targets)
    return found


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
