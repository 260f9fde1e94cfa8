"""Trainings of methods that use parts."""

from typing import ClassVar

import pytest
import torch
from test_resume import assert_same_run, crash, interrupt
from torch import Tensor, nn

from crossx.errors import CrossXError, UsageError
from crossx.methods import registry
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method
from crossx.training.fit import fit, resume


class Parted(Method):
    """Learns where the parts are from the pooled features, and the classes from both.

    Args:
        backbone: The trunk.
        num_classes: K.
        part_names: Names of the parts.
    """

    uses_parts = True
    seen: ClassVar[list[Tensor]] = []

    def __init__(self, backbone, num_classes, *, part_names: list[str] | None = None) -> None:
        super().__init__(backbone, num_classes)
        backbone.drop_head()
        channels = backbone.channels["last"]
        self.head = nn.Linear(channels, num_classes)
        self.places = nn.Linear(channels, 2 * len(part_names or ["beak"]))

    def embeddings(self, images: Tensor) -> Tensor:
        return self.backbone(images)["last"].mean((2, 3))

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"head": self.head(self.embeddings(images))}

    def linear_heads(self) -> dict[str, nn.Linear]:
        return {"head": self.head}

    def prepare(self, batches) -> None:
        images, targets, parts = next(iter(batches))
        assert len(images) == len(targets) == len(parts)

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        raise AssertionError("training has parts")

    def part_objective(self, images: Tensor, targets: Tensor, parts: Tensor) -> Objective:
        self.seen.append(parts)
        features = self.embeddings(images)
        errors = self.places(features).view(len(images), -1, 2) - parts[..., :2] / images.shape[-1]
        logits = self.head(features)
        terms = {"data": self.criterion(logits, targets), "places": (errors * parts[..., 2:]).square().mean()}
        return Objective.of(terms, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": self.backbone(images)["last"].mean(1, keepdim=True)}


@pytest.fixture
def parted(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(Parted, "seen", [])
    register_method("parted")(Parted)


@pytest.mark.slow
def test_parts_reach_the_method_and_a_killed_run_resumes(make_config, monkeypatch, birds, parted) -> None:
    sections = {
        "model": {"method": "parted"},
        "data": {**birds, "augmentation": "trivial"},
        "optim": {"fit_heads": 1, "ema_decay": 0.8},
        "trainer": {"max_epochs": 2},
    }
    whole = fit(make_config("whole", **sections))
    parts = torch.cat(Parted.seen)
    names = whole.read_spec().options["part_names"]
    assert set(names) == {"beak", "crown", "face", "throat", "breast", "wing", "tail", "legs"}
    assert parts.shape[1:] == (len(names), 3)
    assert 0 < parts[..., 2].mean() < 1
    assert not parts[parts[..., 2] == 0].any()
    interrupt(monkeypatch, 4, crash)
    config = make_config("stopped", **sections)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.slow
def test_part_names_choose_parts_and_their_order(make_config, birds, parted) -> None:
    model = {"method": "parted", "part_names": ["tail", "beak"]}
    run = fit(make_config(model=model, data=birds, trainer={"max_epochs": 1, "limit_train_batches": 1}))
    assert run.read_spec().options["part_names"] == ["tail", "beak"]
    assert Parted.seen[0].shape[1:] == (2, 3)


def test_what_has_no_parts_is_refused_before_training(make_config, birds, parted) -> None:
    model = {"method": "parted"}
    with pytest.raises(CrossXError, match=r"method 'parted' needs parts.*'folder' have none"):
        fit(make_config("a", model=model))
    with pytest.raises(UsageError, match=r"has no part 'beek'\. Did you mean 'beak'"):
        fit(make_config("b", model={**model, "part_names": ["beek"]}, data=birds))
    with pytest.raises(UsageError, match="part_names is of the wrong type"):
        fit(make_config("c", model={**model, "part_names": "beak"}, data=birds))
    for mix in ("mixup", "cutmix"):
        with pytest.raises(UsageError, match=r"does not support optim\.mixup and optim\.cutmix"):
            fit(make_config("d", model=model, data=birds, optim={mix: 0.5}))
