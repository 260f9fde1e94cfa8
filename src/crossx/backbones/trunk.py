"""A timm model as all methods use it: the maps of its last two stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn

from crossx.backbones.blocks import (
    ATTENTION_SLOTS,
    expand_stage,
    first_hidden,
    has_first_hidden,
    original_name,
    previous_index,
    residual_steps,
    resized,
)
from crossx.errors import UsageError, check_choice, first_line
from crossx.layers import (
    OSME,
    Gating,
    PartAssignment,
    ResidualOSME,
    SeparateOSME,
    enlarge,
    evaluation_mode,
    join_stages,
    recompute,
)

Placement: TypeAlias = Literal["residual", "output"]
Layer: TypeAlias = Literal["pooled", "fc6"]


class Backbone(nn.Module):
    """A timm model without its classifier that returns the maps of two stages.

    ``last`` is the map that the model's own classifier would pool. ``previous`` is the deepest map of half its stride
    or, if all maps have the same stride (ViT), the one after three quarters of the blocks.

    Args:
        name: The name that the user gave.
        architecture: timm's name of the architecture; together with ``args`` it rebuilds the trunk without the files
            of ``name``.
        args: Arguments of the architecture.
        trunk: The timm model, without classifier.
        image_size: Side of the images that layers on top are built for, in pixels; default: the model's own.

    Attributes:
        channels: Stage name -> channels of its map.
        strides: Stage name -> input pixels per spatial position, along one side.
        data_config: timm's mean, std, interpolation and input_size for this model and its weights.
        image_size: As given, or the model's own.
        stage_maps: Stage name -> identity module that the stage's map passes through, for hooks.
        recomputes: Whether activations are recomputed in the backward pass; see ``recompute_activations``.
    """

    def __init__(
        self,
        name: str,
        architecture: str,
        args: Mapping[str, Any],
        trunk: Any,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.architecture = architecture
        self.args = dict(args)
        self.trunk: Any = trunk
        self.data_config: dict[str, Any] = resolve_model_data_config(trunk)
        self.image_size: int = image_size or self._own_size
        info = self._info = [dict(stage) for stage in trunk.feature_info]
        self._tokens = getattr(trunk, "num_prefix_tokens", None) is not None
        self._deepest = len(info) - 1
        self.channels = {"previous": 0, "last": int(trunk.num_features)}
        self.strides = {"previous": 0, "last": int(info[-1]["reduction"])}
        self._previous = -1
        self._set_previous(previous_index([stage["reduction"] for stage in info]))
        self.osme = nn.ModuleDict()
        self.assignment: PartAssignment | None = None
        self.stage_maps = nn.ModuleDict({stage: nn.Identity() for stage in self.channels})
        self._slots: dict[str, ResidualOSME] = {}
        self.recomputes = False
        self._steps = residual_steps(trunk, [stage["module"] for stage in info])
        if self._steps is None and not hasattr(trunk, "forward_intermediates"):
            raise UsageError(f"backbone {name!r} has no stage maps in timm (no forward_intermediates).")

    def take_previous(self, stride: int) -> None:
        """Choose the deepest map of a stride, other than ``last``, as ``previous``.

        Raises:
            UsageError: If the backbone has no such map.
        """
        # the first map is that of the stem
        strides = [int(stage["reduction"]) for stage in self._info[1:-1]]
        if stride not in strides:
            known = ", ".join(map(str, sorted(set(strides)))) or "none"
            raise UsageError(
                f"backbone {self.name!r} has no map of stride {stride} before its last one; it has: {known}."
            )
        self._set_previous(max(index for index, own in enumerate(strides, start=1) if own == stride))

    def stage_of_stride(self, stride: int) -> str:
        """Return the name of the module that ends the deepest map of a stride before ``last``.

        Raises:
            UsageError: If the backbone has no such map.
        """
        strides = {int(stage["reduction"]): str(stage["module"]) for stage in self._info[:-1]}
        if stride not in strides:
            known = ", ".join(map(str, sorted(strides))) or "none"
            raise UsageError(
                f"backbone {self.name!r} has no map of stride {stride} before its last one; it has: {known}."
            )
        return strides[stride]

    def attach_osme(
        self,
        stage: str,
        num_parts: int,
        reduction: int,
        placement: Placement | None,
        gating: Gating | None = None,
    ) -> None:
        """Make ``forward`` return attention features (B, P, C, H, W) for a stage instead of its map.

        Args:
            stage: ``previous`` or ``last``.
            num_parts: P.
            reduction: See ``OSME``.
            placement: ``residual`` gates F(x) inside the stage's last block, before the shortcut is added, and leaves
                the rest of the trunk unchanged. ``output`` gates the stage's map. None chooses ``residual`` if the
                backbone has suitable blocks and the gates are those of Eq. 1.
            gating: See ``OSME``.

        Raises:
            UsageError: For ``residual`` on a backbone without such blocks or with other gates, or invalid options of
                OSME.
        """
        if placement is not None:
            check_choice("osme_placement", placement, get_args(Placement))
        osme = OSME(self.channels[stage], num_parts, reduction, gating)
        other = osme.gating.gates != "sigmoid"
        if placement == "output" or (placement is None and (self._steps is None or other)):
            self.osme[stage] = osme
            return
        if other:
            raise UsageError(
                f"osme_placement=residual: the shortcut would bypass {osme.gating.gates} gates; use output, their "
                "default."
            )
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
        # a plain dict: as a second submodule, the slot would be in the state dict twice
        self._slots[stage] = slot

    def attach_assignment(
        self, num_parts: int, detach: bool = False, whole: bool = False, detach_shares: bool = False
    ) -> None:
        """Multiply all attention features with the shares of the parts in each position.

        Call ``attach_osme`` before, with placement ``output`` and one more part if ``whole``; the options are those of
        ``PartAssignment``. Maps are enlarged to the size of ``previous`` if it has attention features.
        """
        channels = sum(self.channels[stage] for stage in self.osme)
        self.assignment = PartAssignment(channels, num_parts, detach, whole, detach_shares)

    def separate_parts(self) -> None:
        """Make ``forward`` return the attention features of a stage as P maps (B, C, h, w), for inference only."""
        for stage, osme in self._gated():
            self.osme[stage] = SeparateOSME(osme)
        for stage, slot in self._slots.items():
            separate: Any = SeparateOSME(slot)
            block = self._last_block(stage)
            setattr(block, ATTENTION_SLOTS[type(block)], separate)
            self._slots[stage] = separate

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps ``previous`` and ``last``, (B, C, h, w), for images (B, 3, H, W).

        A stage with OSME has attention features, (B, P, C, h, w), instead.
        """
        maps = self.ungated(images)
        return self.excite(maps, self.gates(maps), self.assign(maps))

    def ungated(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of ``forward`` before the gates of placement ``output``."""
        return self._run_trunk(images) if self._steps is None else self._run_steps(images)

    def gates(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return stage -> gates (B, M, C) of placement ``output``, for the result of ``ungated``; see ``OSME``."""
        return {stage: osme.gates(maps[stage]) for stage, osme in self._gated()}

    def assign(self, maps: Mapping[str, Tensor]) -> Tensor | None:
        """Return the shares of the parts and of the background in each position, float32 (B, P + 1, h, w).

        They are the same for all stages, at the resolution of the largest map with attention features. None without
        ``attach_assignment``.
        """
        return None if self.assignment is None else cast(Tensor, self.assignment(self.assignable(maps)))

    def assignable(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return what the prototypes are compared with, (B, C, h, w), for the result of ``ungated``."""
        return join_stages(maps["last"], maps["previous"]) if "previous" in self.osme else maps["last"]

    def excite(
        self, maps: Mapping[str, Tensor], gates: Mapping[str, Tensor], shares: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return what ``forward`` does, for the results of ``ungated``, ``gates`` and ``assign``."""
        excited = dict(maps)
        weights = None if self.assignment is None or shares is None else self.assignment.weights(shares)
        for stage, osme in self._gated():
            u = maps[stage] if weights is None else enlarge(maps[stage], weights)
            excited[stage] = osme.excite(u, gates[stage])  # (B, C, h, w) -> (B, P, C, h, w)
            if weights is not None:
                excited[stage] = excited[stage] * weights[:, :, None].to(u)  # (B, P, h, w) -> (B, P, 1, h, w)
        return {stage: self.stage_maps[stage](map_) for stage, map_ in excited.items()}

    def clone(self) -> Backbone:
        """Return a second trunk that starts with the same weights and gates; like the first, it is pretrained."""
        return deepcopy(self)

    def drop_head(self) -> None:
        """Remove the layers that only the model's own classifier needs, for methods with their own heads.

        Unused weights would cost memory and make DDP fail. ``pool`` does not work afterwards; ``features`` does.
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
        self._probe(self._own_size)
        for hook in hooks:
            hook.remove()
        for name, module in leaves.items():
            if module not in called:
                self.trunk.set_submodule(name, nn.Identity())

    def freeze_after_previous(self) -> None:
        """Switch off the gradients of the layers that only ``last`` depends on, for methods that ignore it.

        DDP fails on trainable weights without a gradient.
        """
        parameters = list(self.trunk.parameters())
        size = self._own_size
        with evaluation_mode(self), torch.inference_mode(False), torch.enable_grad():
            previous = self.forward(parameters[0].new_zeros(1, 3, size, size))["previous"]
            gradients = torch.autograd.grad(previous.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)

    def recompute_activations(self) -> None:
        """Store only the inputs of the blocks in training, and recompute the rest in the backward pass.

        Residual trunks use ``crossx.layers.recompute`` for each block. Other trunks use timm's checkpointing, which
        updates the running statistics of batch norms twice per batch.

        Raises:
            UsageError: If timm does not support it for this backbone.
        """
        self.recomputes = True
        if self._steps is None:
            try:
                self.trunk.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                raise UsageError(f"backbone {self.name!r} cannot recompute activations in timm.") from error

    def features(self, images: Tensor) -> Tensor:
        """Return the model's own features for images (B, 3, H, W), in timm's layout; the input of ``pool``."""
        features: Tensor = (
            self.trunk.forward_features(images) if self._steps is None else self._run_steps(images)["last"]
        )
        seen: Tensor = self.stage_maps["last"](features)
        return seen

    def pool(self, features: Tensor, layer: Layer = "pooled") -> Tensor:
        """Return one feature vector per image, (B, ``layer_channels(layer)``), for the result of ``features``.

        Args:
            features: In timm's layout.
            layer: ``pooled``: the input of the model's own classifier; ``fc6``: the first fully connected layer.
        """
        if layer == "fc6":
            return first_hidden(self.trunk, features)
        # timm's layout -> (B, pooled_channels)
        pooled: Tensor = self.trunk.forward_head(features, pre_logits=True)
        return pooled

    def layer_channels(self, layer: Layer) -> int:
        """Return the number of channels that ``pool`` returns for a layer.

        Raises:
            UsageError: If the backbone has no such layer.
        """
        check_choice("layer", layer, get_args(Layer))
        if layer == "fc6" and not has_first_hidden(self.trunk):
            raise UsageError(
                f"backbone {self.name!r} has no fc6: only AlexNet and VGG have one. Use layer pooled."
            )
        return self.pooled_channels

    @property
    def pooled_channels(self) -> int:
        """Number of channels that ``pool`` returns."""
        return int(self.trunk.head_hidden_size)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the trunk's own parameters, without those of attached OSME gates."""
        new = {id(p) for module in self.modules() if isinstance(module, OSME) for p in module.parameters()}
        return [parameter for parameter in self.trunk.parameters() if id(parameter) not in new]

    def timm_names(self) -> dict[str, str]:
        """Return key of the trunk's state dict -> timm's name, the same whatever gates and heads were attached."""
        return {key: original_name(self.trunk, key) for key in self.trunk.state_dict()}

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of the trunk with position embeddings resampled to this trunk's image size."""
        return resized(self.trunk, state)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Return ``pretrained_parameters`` grouped by depth, shallow to deep, as for timm's layer decay."""
        own = {id(parameter) for parameter in self.pretrained_parameters()}
        named = dict(self.trunk.named_parameters())
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False))
        depths = [
            [named[name] for name in groups[depth] if id(named[name]) in own] for depth in sorted(groups)
        ]
        return [group for group in depths if group]

    def map_size(self, image_size: int | None = None, stage: str = "last") -> tuple[int, int]:
        """Return (h, w) of a stage's map for square images, found by running one empty image.

        Args:
            image_size: Side of the image in pixels; default: ``self.image_size``.
            stage: ``previous`` or ``last``.

        Raises:
            UsageError: If the backbone does not accept that size.
        """
        size = image_size or self.image_size
        try:
            height, width = self._probe(size, stage)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"image_size {size} does not work with backbone {self.name!r} ({first_line(error)}). Its own size is "
                f"{self._own_size}: --data.image_size {self._own_size}, or --model.backbone_args.img_size {size}."
            ) from error
        return height, width

    def check_image_size(self, size: int) -> None:
        """Check that the backbone can use square images of ``size`` pixels.

        Raises:
            UsageError: If it does not accept that size, or its last map has fewer than 2 x 2 spatial positions.
        """
        height, width = self.map_size(size)
        if min(height, width) < 2:
            raise UsageError(
                f"image_size {size} is too small for backbone {self.name!r}: its last map is {height} x {width}. "
                f"Use --data.image_size {2 * self.strides['last']} or more."
            )

    @property
    def unpooled_stage(self) -> str:
        """Stage of the deepest map before pooling: ``previous`` if only pooling follows it (VGG), else ``last``."""
        end = self.trunk.get_submodule(self._info[self._deepest]["module"])
        follows = self._previous == self._deepest - 1 and isinstance(end, nn.MaxPool2d | nn.AvgPool2d)
        return "previous" if follows else "last"

    @property
    def _own_size(self) -> int:
        """Side of the images that the model was built for, in pixels."""
        # timm's data_config ignores img_size
        size = self.args.get("img_size") or self.data_config["input_size"][-1]
        return size if isinstance(size, int) else size[-1]

    def _gated(self) -> list[tuple[str, OSME]]:
        return [(stage, cast(OSME, osme)) for stage, osme in self.osme.items()]

    def _set_previous(self, index: int) -> None:
        if index == self._previous:
            return
        stage = self._info[index]
        self._previous = index
        self.channels["previous"] = expand_stage(self.trunk, stage["module"]) or int(stage["num_chs"])
        self.strides["previous"] = int(stage["reduction"])

    def _probe(self, size: int, stage: str = "last") -> torch.Size:
        """Return (h, w) of a stage's map for one empty image, run in evaluation mode."""
        with evaluation_mode(self), torch.inference_mode():
            maps = self.ungated(next(self.parameters()).new_zeros(1, 3, size, size))
        return maps[stage].shape[-2:]

    def _run_trunk(self, images: Tensor) -> dict[str, Tensor]:
        wanted = [self._previous, self._deepest] if self._tokens else [self._previous]
        last, maps = self.trunk.forward_intermediates(
            images, indices=wanted, norm=self._tokens, output_fmt="NCHW"
        )
        if self._tokens:
            last = maps[1]
        elif last.shape[1] != self.channels["last"]:
            last = last.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return {"previous": maps[0], "last": last}

    def _run_steps(self, x: Tensor) -> dict[str, Tensor]:
        assert self._steps is not None
        steps, ends = self._steps
        maps: dict[str, Tensor] = {}
        stages = {ends[self._previous]: "previous", ends[self._deepest]: "last"}
        # timm's first map is that of the stem; each of the others ends a stage of blocks
        first = steps.index(ends[1])
        x = self._recomputed(lambda x: self._run_stem(steps[:first], x), x, self.trunk)
        for step in steps[first:]:
            for block in self.trunk.get_submodule(step).children():
                x = self._recomputed(block, x, block)
            stage = stages.get(step)
            if stage in self._slots:
                x, maps[stage] = self._slots[stage].split(x)  # -> (B, C, h, w) and (B, P, C, h, w)
            elif stage is not None:
                maps[stage] = x
        return maps

    def _run_stem(self, steps: Sequence[str], x: Tensor) -> Tensor:
        for step in steps:
            x = self.trunk.get_submodule(step)(x)
        return x

    def _recomputed(self, part: Callable[[Tensor], Tensor], x: Tensor, owner: nn.Module) -> Tensor:
        y: Tensor = recompute(part, x, norms_of=owner) if self.recomputes else part(x)
        return y

    def _last_block(self, stage: str) -> Any:
        assert self._steps is not None
        index = self._previous if stage == "previous" else self._deepest
        return list(self.trunk.get_submodule(self._steps[1][index]).children())[-1]
