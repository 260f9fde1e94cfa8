"""Pretrained trunks. The only file that knows timm."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.layers import SEModule
from timm.models import (
    efficientnet,
    group_parameters,
    load_model_config_from_hf,
    mobilenetv3,
    res2net,
    resnet,
    senet,
    sknet,
)
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from crossx.errors import CrossXError, UsageError, nearest
from crossx.layers import OSME, ResidualOSME

log = logging.getLogger(__name__)

Placement: TypeAlias = Literal["residual", "output"]

STAGES = ("previous", "last")

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
"""Residual blocks whose attention slot sees F(x) right before the shortcut is added, and the slot's name."""


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
"""timm looks for this name when a model is registered."""


@timm.models.register_model  # type: ignore[untyped-decorator]
def seresnet50_16units(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-50 with 16 hidden units in every SE gate: the trunk of the released SENet checkpoints."""
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


class Backbone(nn.Module):
    """A timm model without its classifier, giving the maps of two stages.

    ``last`` is the map that the model's own classifier would pool; ``previous`` the deepest map of half its
    stride, or, where all maps have one stride (ViT), the one after three quarters of the blocks.

    Args:
        name: The name that the user gave.
        architecture: timm's name of the architecture, which with ``args`` rebuilds the trunk without ``name``'s files.
        args: Arguments of the architecture.
        trunk: The timm model, without classifier.

    Attributes:
        channels: Stage name -> channels of its map.
        strides: Stage name -> input pixels over map pixels, along one side.
        data_config: timm's mean, std, interpolation and input_size for this model and its weights.
    """

    def __init__(self, name: str, architecture: str, args: Mapping[str, Any], trunk: Any) -> None:
        super().__init__()
        self.name = name
        self.architecture = architecture
        self.args = dict(args)
        self.trunk: Any = trunk
        self.data_config: dict[str, Any] = resolve_model_data_config(trunk)
        if not hasattr(trunk, "forward_intermediates"):
            raise UsageError(f"backbone {name!r} gives no stage maps in timm (no forward_intermediates).")
        info = list(trunk.feature_info)
        self._tokens = getattr(trunk, "num_prefix_tokens", None) is not None
        self._previous = _previous_index([stage["reduction"] for stage in info])
        self._deepest = len(info) - 1
        expanded = _expand_stage(trunk, info[self._previous]["module"])
        self.channels = {
            "previous": expanded or info[self._previous]["num_chs"],
            "last": self.trunk.num_features,
        }
        self.strides = {"previous": info[self._previous]["reduction"], "last": info[-1]["reduction"]}
        self.osme = nn.ModuleDict()
        self._slots: dict[str, ResidualOSME] = {}
        self._steps = _residual_steps(trunk, [stage["module"] for stage in info])

    @property
    def has_residual_blocks(self) -> bool:
        """Whether OSME can be placed inside the last residual block of both stages."""
        return self._steps is not None

    def attach_osme(self, stage: str, num_parts: int, reduction: int, placement: Placement | None) -> None:
        """Make ``forward`` return attention features (B, P, C, H, W) for a stage instead of its map.

        Args:
            stage: ``previous`` or ``last``.
            num_parts: P.
            reduction: See ``OSME``.
            placement: ``residual`` gates F(x) inside the stage's last block, before the shortcut is added; the
                trunk goes on as it was. ``output`` gates the stage's map. None takes ``residual`` where the
                backbone has residual blocks to extend.

        Raises:
            UsageError: For ``residual`` on a backbone without such blocks, or options OSME refuses.
        """
        osme = OSME(self.channels[stage], num_parts, reduction)
        if placement == "output" or (placement is None and self._steps is None):
            self.osme[stage] = osme
            return
        if self._steps is None:
            raise UsageError(
                f"osme_placement=residual: {self.name!r} has no residual blocks that can be extended; use output."
            )
        block = self._last_block(stage)
        slot_name = ATTENTION_SLOTS[type(block)]
        drop_path = getattr(block, "drop_path", None)
        slot = ResidualOSME(osme, getattr(block, slot_name), drop_path, keep_trunk=stage != "last")
        setattr(block, slot_name, slot)
        if drop_path is not None:
            block.drop_path = None
        # A plain dict: registered a second time, its weights would stand twice in the state dict.
        self._slots[stage] = slot

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``previous`` and ``last`` of images (B, 3, H, W).

        Each is a map (B, C, h, w), or attention features (B, P, C, h, w) where OSME is attached.
        """
        maps = self._run_steps(images) if self._slots else self._run_trunk(images)
        return {stage: self.osme[stage](map_) if stage in self.osme else map_ for stage, map_ in maps.items()}

    def drop_head(self) -> None:
        """Remove the layers that only the model's own classifier runs, for methods with heads of their own.

        ``features`` still works afterwards, ``pool`` does not. Unused weights would cost memory and make DDP fail.
        """
        if self._slots:
            return
        leaves = {
            name: module
            for name, module in self.trunk.named_modules()
            if name and not list(module.children()) and list(module.parameters())
        }
        called: set[nn.Module] = set()
        hooks = [m.register_forward_hook(lambda module, *_: called.add(module)) for m in leaves.values()]
        self._probe(self.data_config["input_size"][-1])
        for hook in hooks:
            hook.remove()
        for name, module in leaves.items():
            if module not in called:
                self.trunk.set_submodule(name, nn.Identity())

    def features(self, images: Tensor) -> Tensor:
        """Return the model's own features of images (B, 3, H, W), in timm's layout, for ``pool``."""
        features: Tensor = self.trunk.forward_features(images)
        return features

    def pool(self, features: Tensor) -> Tensor:
        """Return what the model's own classifier would see, (B, ``pooled_channels``), of ``features``."""
        pooled: Tensor = self.trunk.forward_head(features, pre_logits=True)
        return pooled

    @property
    def pooled_channels(self) -> int:
        """Width of ``pool``'s result."""
        return int(self.trunk.head_hidden_size)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the trunk's own parameters, without those of attached OSME gates."""
        new = {id(p) for module in self.modules() if isinstance(module, OSME) for p in module.parameters()}
        return [parameter for parameter in self.trunk.parameters() if id(parameter) not in new]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Return ``pretrained_parameters`` by depth, shallow to deep, as timm's layer decay groups them."""
        own = {id(parameter) for parameter in self.pretrained_parameters()}
        named = dict(self.trunk.named_parameters())
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False))
        depths = [
            [named[name] for name in groups[depth] if id(named[name]) in own] for depth in sorted(groups)
        ]
        return [group for group in depths if group]

    def check_image_size(self, size: int) -> None:
        """Run one empty image through the trunk.

        Raises:
            UsageError: If the backbone refuses that size or is left with fewer than 2 x 2 places to attend to.
        """
        smallest = 2 * self.strides["last"]
        try:
            height, width = self._probe(size)
        except (AssertionError, RuntimeError, ValueError) as error:
            own = self.data_config["input_size"][-1]
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"image_size {size} does not work with backbone {self.name!r} ({reason.rstrip('.')}). "
                f"Its own size is {own}: --data.image_size {own}, or --model.backbone_args.img_size {size}."
            ) from error
        if min(height, width) < 2:
            raise UsageError(
                f"image_size {size} is too small for backbone {self.name!r}: its last map has {height} x {width} "
                f"places. Use --data.image_size {smallest} or more."
            )

    def _probe(self, size: int) -> torch.Size:
        """Run one empty image in evaluation mode and return the last map's (h, w)."""
        modes = {module: module.training for module in self.modules()}
        try:
            with torch.inference_mode():
                last = self.eval().forward(next(self.parameters()).new_zeros(1, 3, size, size))["last"]
        finally:
            for module, training in modes.items():
                module.training = training
        return last.shape[-2:]

    def _run_trunk(self, images: Tensor) -> dict[str, Tensor]:
        wanted = [self._previous, self._deepest] if self._tokens else [self._previous]
        last, maps = self.trunk.forward_intermediates(
            images, indices=wanted, norm=self._tokens, output_fmt="NCHW"
        )
        if self._tokens:
            last = maps[1]
        elif last.shape[1] != self.channels["last"]:
            last = last.permute(0, 3, 1, 2)
        return {"previous": maps[0], "last": last}

    def _run_steps(self, x: Tensor) -> dict[str, Tensor]:
        assert self._steps is not None
        maps: dict[str, Tensor] = {}
        ends = {self._steps[1][self._previous]: "previous", self._steps[1][self._deepest]: "last"}
        for step in self._steps[0]:
            x = getattr(self.trunk, step)(x)
            stage = ends.get(step)
            if stage is None:
                continue
            if stage in self._slots:
                keep = int(self._slots[stage].keep_trunk)
                maps[stage] = x[keep:].transpose(0, 1)
                x = x[0]
            else:
                maps[stage] = x
        return maps

    def _last_block(self, stage: str) -> Any:
        assert self._steps is not None
        index = self._previous if stage == "previous" else self._deepest
        return list(self.trunk.get_submodule(self._steps[1][index]).children())[-1]


def create_backbone(
    name: str, *, pretrained: bool = False, weights: str | None = None, args: Mapping[str, Any] | None = None
) -> Backbone:
    """Build a trunk by its timm name.

    Args:
        name: A timm model, with or without a weight tag (``resnet50.tv_in1k``), ``hf-hub:USER/NAME`` or
            ``local-dir:FOLDER``.
        pretrained: Whether to load the weights that belong to the name.
        weights: A state dict (``.pth``, ``.pt``, ``.safetensors``) to load instead.
        args: Further arguments of ``timm.create_model``.

    Raises:
        UsageError: If timm knows no such model or it does not take these arguments.
        CrossXError: If the weights cannot be had or do not fit.
    """
    architecture, own_args = _resolve(name)
    merged = {**own_args, **(args or {})}
    try:
        trunk = timm.create_model(
            name, pretrained=pretrained and weights is None, num_classes=0, **dict(args or {})
        )
    except TypeError as error:
        raise UsageError(
            f"backbone {name!r} does not take backbone_args {dict(args or {})}: {error}."
        ) from error
    except Exception as error:
        if not pretrained or weights is not None:
            raise UsageError(f"backbone {name!r} cannot be built: {_first_line(error)}.") from error
        raise CrossXError(
            f"backbone {name!r}: its pretrained weights cannot be had ({_first_line(error)}). Check the network, "
            "or use --model.backbone_weights FILE, --model.backbone local-dir:FOLDER or --model.pretrained false."
        ) from error
    if weights is not None:
        load_trunk_weights(trunk, Path(weights))
    return Backbone(name, architecture, merged, trunk)


def load_trunk_weights(trunk: nn.Module, path: Path) -> list[str]:
    """Load a plain state dict into a timm model and warn of every key that did not match.

    A leading ``module.``, a wrapping ``state_dict`` or ``model`` entry and classifier weights are accepted.

    Returns:
        One line for each key that was missing, not known or of another shape.

    Raises:
        CrossXError: If the file cannot be read or none of its keys match.
    """
    state = read_state_dict(path)
    own = trunk.state_dict()
    matching = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if not matching:
        found = ", ".join(list(state)[:3])
        raise CrossXError(f"{path}: none of its {len(state)} keys ({found}, ...) belongs to this backbone.")
    trunk.load_state_dict(matching, strict=False)
    problems = [
        f"missing: {key}" for key in own if key not in state and not key.endswith("num_batches_tracked")
    ]
    for key, value in state.items():
        if key not in own:
            problems.append(f"not known: {key}")
        elif own[key].shape != value.shape:
            problems.append(f"shape {tuple(value.shape)}, the backbone has {tuple(own[key].shape)}: {key}")
    if problems:
        log.warning(
            "%s: %d of the backbone's %d tensors were loaded; what did not match:\n  %s",
            path, len(matching), len(own), "\n  ".join(problems),
        )  # fmt: skip
    return problems


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors`` or a PyTorch file (``weights_only=True``), ``module.`` removed.

    Raises:
        CrossXError: If there is no such file or it holds something else.
    """
    if not path.is_file():
        raise CrossXError(f"{path}: no such weights file.")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CrossXError(f"{path}: not a weights file ({_first_line(error)}).") from error
    except Exception as error:
        raise CrossXError(
            f"{path}: not a plain state dict; files that hold Python objects are not loaded."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CrossXError(f"{path}: not a plain state dict of tensors.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture behind a name and the arguments that come with it."""
    source, _, identifier = name.partition(":")
    if source == "local-dir" and identifier:
        path = Path(identifier) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            architecture, own_args = config["architecture"], config.get("model_args") or {}
        except FileNotFoundError as error:
            raise UsageError(
                f"backbone {name!r}: there is no {path}; timm's config.json must lie there."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"backbone {name!r}: {path} is not a timm config ({error}).") from error
    elif source == "hf-hub" and identifier:
        try:
            _, architecture, own_args = load_model_config_from_hf(identifier)
        except Exception as error:
            raise CrossXError(
                f"backbone {name!r} cannot be had from the Hugging Face Hub ({_first_line(error)}). Check the name "
                "and the network, or use --model.backbone local-dir:FOLDER."
            ) from error
    else:
        architecture, own_args = name, {}
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"unknown backbone {name!r}.{nearest(base, timm.list_models())} "
            "Every name of timm.list_models() works; also local-dir:FOLDER and hf-hub:USER/NAME."
        )
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if tag and architecture not in tagged:
        raise UsageError(
            f"unknown weights {architecture!r}.{nearest(architecture, tagged)} "
            f"timm has for {base}: {', '.join(tagged) or 'none'}."
        )
    return architecture, dict(own_args or {})


def _previous_index(reductions: Sequence[int]) -> int:
    """Return which stage map is ``previous``, given each map's stride, shallow to deep."""
    twice = [index for index, stride in enumerate(reductions) if 2 * stride == reductions[-1]]
    return twice[-1] if twice else max(0, (3 * len(reductions)) // 4 - 1)


def _expand_stage(trunk: nn.Module, stage: str) -> int | None:
    """Let a stage of inverted residual blocks end with the next one's expansion, and return its channels.

    In EfficientNet and MobileNet the deepest map at a stride is the expanded one inside the next stage's first
    block, before its strided convolution; the stage's own output is a bottleneck a sixth as wide. Moving the
    expansion to the end of the stage computes the same in the same order. None where the trunk is of another kind.
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


def _residual_steps(trunk: nn.Module, ends: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Return the trunk's children to run in order and those that end a stage, None unless it is of that plain kind."""
    if not isinstance(trunk, resnet.ResNet | senet.SENet):
        return None
    for name in ends[-2:]:
        if type(list(trunk.get_submodule(name).children())[-1]) not in ATTENTION_SLOTS:
            return None
    children = [name for name, _ in trunk.named_children()]
    return children[: children.index(ends[-1]) + 1], list(ends)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
