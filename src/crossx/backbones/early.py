"""The first layers of a trunk: run by themselves, and skipped where their output is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crossx.backbones.trunk import Backbone
from crossx.layers import evaluation_mode


class EarlyLayers:
    """The layers of a trunk up to the end of its map of a stride, one after the other.

    Args:
        backbone: The trunk.
        stride: Input pixels per spatial position of the map, along one side.

    Raises:
        UsageError: If the trunk has no map of this stride before its last one.
    """

    def __init__(self, backbone: Backbone, stride: int) -> None:
        self.layers = _layers_up_to(backbone, backbone.stage_of_stride(stride))

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the layers."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the map (B, C, h, w) for normalised images (B, 3, H, W)."""
        for layer in self.layers:
            images = layer(images)
        return images

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Let each layer return its input, so that the trunk takes the map in place of images."""
        for layer in self.layers:
            layer.forward = _return_input
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def _return_input(maps: Tensor) -> Tensor:
    return maps


def _layers_up_to(backbone: Backbone, stage: str) -> list[nn.Module]:
    """Return the modules that a forward pass has completed at the end of a stage, in order, without their parts.

    Sequences count as their members, because a trunk may call those itself.
    """
    trunk = backbone.trunk
    ended: dict[nn.Module, int] = {}

    def note(module: nn.Module, *_: object) -> None:
        ended[module] = len(ended)

    hooks = [module.register_forward_hook(note) for module in trunk.modules() if module is not trunk]
    try:
        backbone.map_size()
    finally:
        for hook in hooks:
            hook.remove()
    last = max(ended[module] for module in trunk.get_submodule(stage).modules() if module in ended)

    def members(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if not isinstance(child, nn.Sequential) and ended.get(child, last + 1) <= last:
                yield child
            else:
                yield from members(child)

    return sorted(members(trunk), key=lambda module: ended[module])


@torch.no_grad()
def can_skip(
    early: EarlyLayers, network: nn.Module, images: Tensor, compute: Callable[[Tensor], Sequence[Tensor]]
) -> bool:
    """Whether a network computes the same from the map of its trunk's early layers as from the images.

    It does not if the trunk does more than to run these layers one after the other, or if the network uses the images
    for something else, such as crops or views of them.

    Args:
        early: The early layers of the network's only trunk.
        network: The network, which is set to evaluation mode for the time.
        images: Normalised images (B, 3, H, W) to try it with.
        compute: What the network computes from images or maps.
    """
    inputs: list[Tensor] = []
    hook = early.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with evaluation_mode(network):
        try:
            expected = compute(images)
        finally:
            hook.remove()
        # a crop or a view of the images cannot be made of their maps
        if not all(torch.equal(given, images) for given in inputs):
            return False
        try:
            maps = early(images)
            with early.skipped():
                found = compute(maps)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
    return len(found) == len(expected) and all(
        own.shape == other.shape and torch.allclose(own, other, rtol=1e-3, atol=1e-3, equal_nan=True)
        for own, other in zip(found, expected, strict=True)
    )
