"""Grad-CAM of the stages' maps, for methods whose heads have no exact class maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crossx.errors import UsageError
from crossx.methods.base import Method


def grad_cam(method: Method, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Compute Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) with captum's ``LayerGradCam``.

    ``ReLU(sum_c a_c A_c)`` (Eq. 2), where ``a_c`` is the mean over spatial positions of the gradient of the class's
    logit with respect to channel c (Eq. 1), for each part of the attention features separately. If crops also pass
    through the trunk, the maps are those of the first pass, of the images.

    Args:
        method: The network, in evaluation mode.
        images: (B, 3, H, W), normalised.
        classes: int64 (B,).

    Returns:
        Stage name -> (B, P, h, w), at least 0, of the backbone's stages that ``method.activation_maps`` names.

    Raises:
        UsageError: If captum is missing, or the network does not classify the maps of a stage.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise UsageError(
            f"class maps of method {method.name!r} on backbone {method.backbone.name!r} need captum: "
            "pip install 'crossx[explain]', or ask for activation maps."
        ) from None
    with torch.no_grad():
        named = method.activation_maps(images)
    maps = {}
    for stage, module in method.backbone.stage_maps.items():
        if stage not in named:
            continue
        # gradients from the images on, so that frozen networks work too
        inputs = images.detach().clone().requires_grad_()
        parts_as_batch = _PartsAsBatch(method, stage)
        hook = module.register_forward_hook(parts_as_batch)
        try:
            values = LayerGradCam(method, parts_as_batch.layer).attribute(
                inputs, target=classes, relu_attributions=True
            )
        finally:
            hook.remove()
        # (B*P, 1, h, w) -> (B, P, h, w)
        maps[stage] = values.detach().view(len(images), -1, *values.shape[-2:])
    if not maps:
        raise _no_maps(method)
    return maps


class _PartsAsBatch:
    """A hook that passes a stage's maps through ``layer`` in the shape that captum takes, parts in the batch."""

    def __init__(self, method: Method, stage: str) -> None:
        self.method, self.channels = method, method.backbone.channels[stage]
        self.layer = nn.Identity()
        self.passed = False

    def __call__(self, module: nn.Module, inputs: Any, maps: Tensor) -> Tensor:
        if self.passed:
            return maps
        self.passed = True
        if maps.dim() < 4 or maps.shape[-3] != self.channels:
            raise _no_maps(self.method)
        passed: Tensor = self.layer(maps.flatten(0, -4))  # (B, P, C, h, w) -> (B*P, C, h, w)
        return passed.view_as(maps)


def _no_maps(method: Method) -> UsageError:
    return UsageError(
        f"method {method.name!r} on backbone {method.backbone.name!r} has no class maps: it does not classify the map "
        "of a stage. Ask for activation maps."
    )
