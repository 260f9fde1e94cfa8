"""Code that depends on the internals of timm's models."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
from timm.layers import SEModule, convert_sync_batchnorm
from timm.models import efficientnet, mobilenetv3, res2net, resnet, senet, sknet
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

ATTENTION_SLOTS: dict[type[nn.Module], str] = {
    resnet.BasicBlock: "se",
    resnet.Bottleneck: "se",
    res2net.Bottle2neck: "se",
    sknet.SelectiveKernelBasic: "se",
    sknet.SelectiveKernelBottleneck: "se",
    senet.SEBottleneck: "se_module",
    senet.SEResNetBlock: "se_module",
    senet.SEResNetBottleneck: "se_module",
    senet.SEResNeXtBottleneck: "se_module",
}
"""Residual blocks that apply attention to F(x) just before adding the shortcut -> the name of that attention slot."""


def previous_index(reductions: Sequence[int]) -> int:
    """Return the index of the map that serves as ``previous``, given the strides of all maps, shallow to deep."""
    half = [index for index, stride in enumerate(reductions) if 2 * stride == reductions[-1]]
    return half[-1] if half else max(0, (3 * len(reductions)) // 4 - 1)


def expand_stage(trunk: nn.Module, stage: str) -> int | None:
    """Move the expansion of the next stage's first block to the end of a stage, and return its channels.

    In EfficientNet and MobileNet, the deepest map of a stride is the expanded one inside the next stage's first block,
    before its strided convolution; the stage's own output is a bottleneck of a sixth of its width. The move does not
    change the order of the operations. Returns None, without a change, for other trunks.
    """
    if not isinstance(trunk, efficientnet.EfficientNet | mobilenetv3.MobileNetV3):
        return None
    name, _, number = stage.rpartition(".")
    block = getattr(trunk.get_submodule(f"{name}.{int(number) + 1}"), "0")
    if type(block) is not InvertedResidual or block.has_skip or block.conv_s2d is not None:
        return None
    channels = int(block.conv_pw.out_channels)
    blocks: Any = trunk.get_submodule(stage)
    blocks.append(nn.Sequential(block.conv_pw, block.bn1))
    block.conv_pw = block.bn1 = nn.Identity()
    return channels


def original_name(trunk: nn.Module, name: str) -> str:
    """Return timm's name of a tensor of a trunk: without the moves of ``expand_stage`` and of OSME's attention slot."""
    moved = re.fullmatch(r"(.+)\.(\d+)\.\d+\.([01])\.(\w+)", name)
    if moved and isinstance(trunk, efficientnet.EfficientNet | mobilenetv3.MobileNetV3):
        stage, number, layer, kind = moved.groups()
        name = f"{stage}.{int(number) + 1}.0.{('conv_pw', 'bn1')[int(layer)]}.{kind}"
    return re.sub(r"\.own\.", ".", name)


def resized(trunk: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resample position embeddings to a trunk built for another image size, as timm does for pretrained weights.

    Tensors that timm cannot resample keep their shape.
    """
    own = trunk.state_dict()
    adapt = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if adapt is None or all(own[key].shape == value.shape for key, value in state.items() if key in own):
        return dict(state)
    try:
        adapted = adapt(dict(state), trunk)
    except Exception:  # written for pretrained weights, of which it may assume anything
        return dict(state)
    return {
        key: value if own[key].shape == value.shape else adapted.get(key, value)
        for key, value in state.items()
        if key in own
    }


def residual_steps(trunk: nn.Module, ends: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Return the names of the trunk's children in forward order, and of those that end a stage.

    None unless the trunk is a ResNet or SENet whose last two stages end with a block of ``ATTENTION_SLOTS``.
    """
    if not isinstance(trunk, resnet.ResNet | senet.SENet):
        return None
    for name in ends[-2:]:
        if type(list(trunk.get_submodule(name).children())[-1]) not in ATTENTION_SLOTS:
            return None
    children = [name for name, _ in trunk.named_children()]
    return children[: children.index(ends[-1]) + 1], list(ends)


def synchronize_batch_norms(network: nn.Module) -> None:
    """Synchronise the statistics of all batch norms in training mode over the ranks.

    timm's conversion keeps the activation of its combined norm-activation layers; PyTorch's drops it.
    """
    norms = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    for name, module in norms:
        if module.training:
            network.set_submodule(name, convert_sync_batchnorm(module))


default_cfgs = timm.models.generate_default_cfgs(
    {
        "seresnet50_16units.untrained": {
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)
"""timm reads this name from the module when it registers a model."""


@timm.models.register_model  # type: ignore[untyped-decorator]
def seresnet50_16units(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build SE-ResNet-50 with 16 hidden units in every SE gate, the trunk of the released SENet checkpoints."""
    blocks = {"attn_layer": partial(SEModule, rd_channels=16)}
    model: nn.Module = timm.models.build_model_with_cfg(
        resnet.ResNet,
        "seresnet50_16units",
        pretrained,
        block=resnet.Bottleneck,
        layers=[3, 4, 6, 3],
        block_args=blocks,
        **kwargs,
    )
    return model
