"""Code that depends on the internals of timm's models."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torchvision
from timm.layers import SEModule, convert_sync_batchnorm
from timm.models import efficientnet, mobilenetv3, res2net, resnet, senet, sknet, vgg
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import AlexNet_Weights

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


def has_first_hidden(trunk: nn.Module) -> bool:
    """Return whether a trunk has hidden fully connected layers, the first of which is fc6."""
    return isinstance(trunk, AlexNet | vgg.VGG)


def first_hidden(trunk: Any, features: Tensor) -> Tensor:
    """Return fc6 after its ReLU, (B, 4096), for the last map (B, C, h, w) of AlexNet or VGG.

    On maps larger than VGG was trained with, timm's fc6 is a convolution, whose results are averaged.
    """
    if isinstance(trunk, AlexNet):
        hidden: Tensor = trunk.classifier[:3](trunk.avgpool(features).flatten(1))  # (B, C, h, w) -> (B, 4096)
        return hidden
    layers = trunk.pre_logits
    height, width = (max(layers.input_kernel_size, side) for side in features.shape[-2:])
    if (height, width) != features.shape[-2:]:
        features = F.adaptive_avg_pool2d(features, (height, width))
    pooled: Tensor = layers.act1(layers.fc1(features)).mean((2, 3))  # (B, 4096, h, w) -> (B, 4096)
    return pooled


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
        },
        "alexnet.tv_in1k": {
            "url": AlexNet_Weights.IMAGENET1K_V1.url,
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (6, 6),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "features.0",
            "classifier": "classifier.6",
        },
    }
)
"""timm reads this name from the module when it registers a model."""


class AlexNet(torchvision.models.AlexNet):  # type: ignore[misc]
    """torchvision's AlexNet (Krizhevsky 2014, https://arxiv.org/abs/1404.5997) with the interface of timm's models.

    Args:
        num_classes: K; 0 removes the classifier.
        in_chans: 3.
        drop_rate: Dropout before the hidden layers.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5) -> None:
        if in_chans != 3:
            raise TypeError(f"AlexNet takes 3 channels, not {in_chans}")
        super().__init__(max(num_classes, 1), drop_rate)
        self.num_features = 256
        self.head_hidden_size = 4096
        self.reset_classifier(num_classes)
        # as timm does for VGG: the maps before each pooling, and the last one after it
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"features.{index}"}
            for channels, stride, index in ((64, 4, 1), (192, 8, 4), (256, 16, 11), (256, 32, 12))
        ]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes remove it."""
        self.num_classes = num_classes
        width = self.head_hidden_size
        self.classifier[6] = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        classifier: nn.Module = self.classifier[6]
        return classifier

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of the layer groups."""
        return {
            "stem": r"^features\.0",
            "blocks": [(r"^features\.(\d+)", None), (r"^classifier\.(\d+)", (100,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse, as timm's VGG does."""
        assert not enable, "gradient checkpointing not supported"

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map, (B, 256, h, w), for images (B, 3, H, W)."""
        features: Tensor = self.features(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, or fc7 (B, 4096) before them, for the last map."""
        hidden: Tensor = self.classifier[:6](self.avgpool(features).flatten(1))  # (B, 256, h, w) -> (B, 4096)
        return hidden if pre_logits else self.classifier[6](hidden)

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int], norm: bool = False, output_fmt: str = "NCHW"
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last map and those of ``feature_info`` at ``indices``."""
        wanted = {self.feature_info[index]["module"] for index in indices}
        maps = []
        for name, layer in self.features.named_children():
            x = layer(x)
            if f"features.{name}" in wanted:
                maps.append(x)
        return x, maps


@timm.models.register_model  # type: ignore[untyped-decorator]
def alexnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build AlexNet with torchvision's layers and weights, which timm does not have."""
    model: nn.Module = timm.models.build_model_with_cfg(AlexNet, "alexnet", pretrained, **kwargs)
    return model


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
