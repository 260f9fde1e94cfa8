"""The class under test, tiny images for it, and how a broken promise is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from crossx.methods import registry
from crossx.methods.base import Method, Objective
from crossx.methods.registry import create_method
from crossx.training.config import ModelConfig

CLASSES = ("ani", "auklet", "bunting")
TARGETS = (0, 1, 2, 2, 1, 0)
"""Two images of every class, in an order in which the first four have both of one class only."""
NUM_PARTS = 11
RESERVED = {"name", "num_classes", "image_size", *vars(ModelConfig())}
"""Arguments of ``create_method`` and keys next to the options in a configuration."""


class BrokenError(AssertionError):
    """A broken promise, in one line."""


@dataclass(frozen=True)
class Subject:
    """A class under test, with what it is built of."""

    cls: type[Method]
    backbone: str
    backbone_args: dict[str, Any]
    image_size: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name that it is registered under during a check."""
        own = self.cls.__dict__.get("name", "")
        return own if registry._REGISTRY.get(own) is self.cls else f"checked_{self.cls.__name__.lower()}"

    @cached_property
    def file(self) -> Path | None:
        """The source file of the class, if it has one."""
        try:
            return Path(inspect.getfile(self.cls))
        except (OSError, TypeError):
            return None

    def build(self, **options: Any) -> Method:
        """Build it with the same random weights on each call."""
        torch.manual_seed(0)
        return create_method(
            self.name,
            backbone=self.backbone,
            num_classes=len(CLASSES),
            image_size=self.image_size,
            backbone_args=self.backbone_args,
            **{**self.options, **options},
        )

    def images(self, count: int = len(TARGETS), seed: int = 1) -> Tensor:
        """Return random images (count, 3, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.image_size, self.image_size, generator=generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return images and targets, two images of every class."""
        return self.images(), torch.tensor(TARGETS)

    def parts(self, images: Tensor) -> Tensor:
        """Return parts (B, N, 3) that depend on each image's own pixels."""
        count = len(self.options.get("part_names") or range(NUM_PARTS))
        numbers = images.flatten(1)[:, : 3 * count].unflatten(1, (count, 3)).abs().float()
        points = (20 * numbers[..., :2]).clamp(max=self.image_size - 1)
        return torch.cat([points, (numbers[..., 2:] > 0.5).float()], 2).to(images.dtype)

    def compute(self, method: Method, images: Tensor, targets: Tensor) -> Objective:
        """Return the objective that is trained, with the same random numbers on each call."""
        torch.manual_seed(2)
        if method.uses_parts:
            return method.part_objective(images, targets, self.parts(images))
        return method.objective(images, targets)


@contextmanager
def known(subject: Subject) -> Iterator[None]:
    """Register the class during a check, if it is not."""
    cls = subject.cls
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise AssertionError(f"{getattr(cls, '__name__', cls)}: is no subclass of crossx.methods.Method.")
    if registry._REGISTRY.get(subject.name) is cls:
        yield
        return
    name, own = subject.name, cls.__dict__.get("name")
    registry.register_method(name)(cls)
    try:
        yield
    finally:
        del registry._REGISTRY[name]
        if own is None:
            del cls.name
        else:
            cls.name = own


def fail(text: str) -> NoReturn:
    """Raise ``BrokenError``."""
    raise BrokenError(text)


def shape_of(value: object) -> str:
    """Return the shape of a tensor, or the type of anything else, for a message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def compare(
    what: str, actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 1e-5, why: str = ""
) -> None:
    """Test that two tensors have the same shape and nearly the same values."""
    if actual.shape != expected.shape:
        fail(f"{what}: {shape_of(actual)} instead of {shape_of(expected)}{why}.")
    if not torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=False):
        difference = (actual.double() - expected.double()).abs().max().item()
        fail(f"{what}: differs by up to {difference:.3g}{why}.")


def check_logits(what: str, value: object, count: int) -> None:
    """Test that something is finite logits (B, K) for ``count`` images."""
    if not isinstance(value, Tensor) or value.shape != (count, len(CLASSES)):
        fail(f"{what} returns {shape_of(value)} for {count} images of {len(CLASSES)} classes, not (B, K).")
    if not value.isfinite().all():
        fail(f"{what} is not finite.")
