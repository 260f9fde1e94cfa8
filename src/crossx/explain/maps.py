"""Activation, combined and class maps of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from crossx.errors import CrossXError, UsageError, check_choice
from crossx.explain.gradcam import grad_cam
from crossx.methods.base import Method

Kind: TypeAlias = Literal["activation", "class", "both"]


@dataclass(frozen=True)
class Explanation:
    """Prediction and maps of one image.

    Attributes:
        probabilities: float32 (K,), the softmax of the logits divided by the temperature.
        target: The class that class maps explain.
        maps: Name -> float32 map, in the order of Fig. 5. ``STAGE part P`` is the activation map (h, w) of part P
            (``STAGE`` if there is only one part); ``combined part P`` is (H, W), see ``combine``; ``CAM STAGE part P``
            or ``Grad-CAM STAGE part P`` is the class map (h, w).
        boxes: float32 (n, 4), the regions of ``Method.boxes``, best first; None for methods without.
    """

    probabilities: NDArray[np.float32]
    target: int
    maps: Mapping[str, NDArray[np.float32]]
    boxes: NDArray[np.float32] | None = None

    @property
    def prediction(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())


def explain_images(
    method: Method,
    images: Tensor,
    *,
    maps: Kind = "activation",
    classes: int | Sequence[int] | Tensor | None = None,
    temperature: float = 1.0,
    probabilities: Tensor | None = None,
) -> list[Explanation]:
    """Compute the maps of images. The method is put into evaluation mode.

    Args:
        method: The trained network.
        images: (B, 3, H, W), normalised; moved to the network's device.
        maps: ``activation``: ``Method.activation_maps`` and the combined maps. ``class``:
            ``Method.class_activation_maps``, or Grad-CAM if the method has none. ``both``.
        classes: The class that class maps explain, one for all images or one per image; default: the predicted ones.
        temperature: The run's, see ``ModelSpec``; maps do not depend on it.
        probabilities: (B, K), if already known, such as the mean over several views of each image.

    Returns:
        One explanation per image, on the CPU.

    Raises:
        UsageError: For unknown ``maps``, or class maps that the network does not have or that need captum.
        CrossXError: If a map is not finite.
    """
    check_choice("maps", maps, get_args(Kind))
    method.eval()
    images = images.to(next(method.parameters()).device)
    with torch.no_grad():
        if probabilities is None:
            probabilities = (method(images).float() / temperature).softmax(1)
        regions = method.boxes(images)
    targets = _targets(probabilities, classes)
    named: dict[str, Tensor] = {}
    if maps != "class":
        named |= _activation(method, images)
    if maps != "activation":
        named |= _of_classes(method, images, targets)
    for name, values in named.items():
        if not values.isfinite().all():
            raise CrossXError(
                f"the map {name!r} is not finite: the network's weights are damaged, or training diverged."
            )
    arrays = {name: values.detach().float().cpu().numpy() for name, values in named.items()}
    boxes = [None] * len(images) if regions is None else list(regions.float().cpu().numpy())
    return [
        Explanation(row, target, {name: values[number] for name, values in arrays.items()}, boxes[number])
        for number, (row, target) in enumerate(
            zip(probabilities.cpu().numpy(), targets.tolist(), strict=True)
        )
    ]


def min_max(maps: Tensor) -> Tensor:
    """Scale each map (..., h, w) to [0, 1] by its minimum and maximum; a constant map becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return (maps - low) / span.where(span > 0, 1)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, P, h, w) to (B, P, H, W) by bilinear interpolation, with aligned outer edges."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def combine(stages: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Combine each part's activation maps of all stages, as in the last columns of Fig. 5.

    The paper does not say how it combines them. Here each stage's map is scaled to [0, 1] (``min_max``), resized to the
    image (``resize``) and averaged over the stages, so that all stages count the same whatever their scale.

    Args:
        stages: Stage name -> (B, P, h, w), of any h and w and the same P.
        size: (H, W) of the image.

    Returns:
        (B, P, H, W), values from 0 to 1.
    """
    return torch.stack([resize(min_max(maps.float()), size) for maps in stages.values()]).mean(0)


@torch.no_grad()
def _activation(method: Method, images: Tensor) -> dict[str, Tensor]:
    stages = method.activation_maps(images)
    named = _by_part(stages)
    parts = {maps.shape[1] for maps in stages.values()}
    if len(stages) > 1 and len(parts) == 1:
        height, width = images.shape[-2:]
        named |= _by_part({"combined": combine(stages, (height, width))})
    return named


def _of_classes(method: Method, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        exact = method.class_activation_maps(images, targets)
    if exact is not None:
        return _by_part({f"CAM {head}": maps for head, maps in exact.items()})
    return _by_part({f"Grad-CAM {stage}": maps for stage, maps in grad_cam(method, images, targets).items()})


def _by_part(stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name -> maps of one part: (B, P, h, w) -> P times (B, h, w)."""
    return {
        f"{stage} part {part}" if maps.shape[1] > 1 else stage: of_part
        for stage, maps in stages.items()
        for part, of_part in enumerate(maps.unbind(1), start=1)
    }


def _targets(probabilities: Tensor, classes: int | Sequence[int] | Tensor | None) -> Tensor:
    number, num_classes = probabilities.shape
    if classes is None:
        return probabilities.argmax(1)
    targets = torch.as_tensor(classes, device=probabilities.device)
    targets = targets.expand(number) if targets.dim() == 0 else targets
    if targets.shape != (number,) or not ((targets >= 0) & (targets < num_classes)).all():
        raise UsageError(
            f"classes must be one class or {number}, each from 0 to {num_classes - 1}, not {classes}."
        )
    return targets.long()
