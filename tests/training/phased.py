"""A method of two phases and two trunks, for tests of what training owes to such a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from crossx.backbones import Backbone
from crossx.methods import Method, Phase, register_method
from crossx.methods.base import Objective

TRAINED = {"one": ("backbone.", "first."), "two": ("glimpse.", "norm.", "second."), "trunk": ("backbone.",)}


class Phased(Method):
    """A first head on the trunk; from the phase ``two`` on, a second one on a copy of it as well.

    Args:
        backbone: The trunk.
        num_classes: K.
        order: ``sequence``: two epochs of the first phase, then the second one; ``turns``: one epoch of each in turn.
        factor: Learning-rate factor of the second phase.
        normalize: Whether the second head has a batch norm, whose statistics are those of a rank.
    """

    started: ClassVar[list[str]] = []
    """The phases that were started, of all objects."""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        order: Literal["sequence", "turns", "trunk"] = "sequence",
        factor: float = 0.1,
        normalize: bool = True,
    ) -> None:
        super().__init__(backbone, num_classes)
        backbone.drop_head()
        self.order, self.factor = order, factor
        self.glimpse = backbone.clone()
        channels = backbone.channels["last"]
        self.norm = nn.BatchNorm1d(channels, affine=False) if normalize else nn.Identity()
        self.first = nn.Linear(channels, num_classes)
        self.second = nn.Linear(channels, num_classes)
        self.register_buffer("steps", torch.ones((), dtype=torch.int64))

    def phase_at(self, epoch: int, epochs: int) -> Phase:
        second = epoch % 2 == 1 if self.order == "turns" else epoch >= 2
        name = "trunk" if self.order == "trunk" else "two" if second else "one"
        return Phase(name, TRAINED[name], self.factor if second else 1.0)

    def start_phase(self, phase: Phase, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        assert self.phase is phase
        self.started.append(phase.name)
        if phase.name == "two" and self.steps == 1:
            self.glimpse.load_state_dict(self.backbone.state_dict())
            images, _ = next(iter(batches))
            with torch.no_grad():
                self.second.weight.copy_(torch.randn_like(self.second.weight) * images[0].std() / 10)
                self.steps.fill_(2)

    def embeddings(self, images: Tensor) -> Tensor:
        return self.backbone(images)["last"].mean((2, 3))

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        heads = {"first": self.first(self.embeddings(images))}
        if self.steps == 2:
            heads["second"] = self.second(self.norm(self.glimpse(images)["last"].mean((2, 3))))
        return heads

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        return Objective.of({"data": self.criterion(logits, targets)}, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": self.backbone(images)["last"].mean(1, keepdim=True)}


def register() -> None:
    register_method("phased")(Phased)
