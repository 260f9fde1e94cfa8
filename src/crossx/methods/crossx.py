"""Cross-X learning (Luo et al., ICCV 2019, https://arxiv.org/abs/1909.04412)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone, Placement
from crossx.errors import UsageError, check_positive
from crossx.layers import (
    Gating,
    MergedFeatures,
    MergedLogits,
    convolution,
    evaluation_mode,
    global_pool,
    recompute,
)
from crossx.layers.feature_pyramid import Interpolation, MergeStatistics
from crossx.layers.osme import Gates
from crossx.layers.pooling import Pooling, pooled_shares
from crossx.losses import (
    C3SLoss,
    CrossLayerLoss,
    outermost,
    part_correlations,
    summarize_correlations,
)
from crossx.losses.c3s import C3SForm
from crossx.methods.base import Method, Objective
from crossx.methods.clusters import refined_prototypes, starting_prototypes
from crossx.methods.part_terms import HEADS, STAGES, PartTerms, by_name, looks
from crossx.methods.registry import register_method

AssignmentStart: TypeAlias = Literal["random", "clusters", "refined"]

CLUSTERED_POSITIONS = 30_000
"""Positions of training images that the prototypes of spatial gates start from: those of 470 maps of 8 x 8."""

log = logging.getLogger(__name__)


@register_method("crossx")
class CrossX(Method):
    """OSME on two stages, merged features, C3S and CL; the options cover the paper's ablation.

    Those from ``gates`` on are not in the paper: they are to make the excitations parts, and are off by default.

    Args:
        backbone: The trunk; OSME gates are attached to its stages.
        num_classes: K.
        num_parts: P, the number of excitation modules (section 4.2 uses 2).
        reduction: Channels per hidden unit of a gate: one number, or one for ``last`` and one for ``previous``.
            SE uses 16; the released code uses 256 on ResNet-50, and 128 and 64 on SENet-50.
        osme_placement: ``residual``: inside the stage's last residual block; ``output``: on the stage's map. Default:
            ``residual`` if the backbone has such blocks, but ``output`` with other gates, separation or presence.
        use_previous: Whether stage L-1 has a head (+GMP or +GAP in the ablation).
        use_merged: Whether the merged features have a head (+FP in the ablation).
        previous_pooling: Pooling of stage L-1: ``max`` (GMP; in the paper for birds) or ``avg`` (GAP; for cars, dogs
            and aircraft).
        interpolation: ``bilinear`` (Eq. 5) or ``nearest`` (released code) in the merged features.
        merged_statistics: Source of the batch norm's variance of Eq. 5 in training: ``map`` (all spatial positions),
            ``strided`` (a quarter of them; faster) or ``pooled`` (the pooled features; fastest, not the paper's model).
        c3s_form: ``paper`` (Eq. 4) or ``released``; see ``crossx.losses.c3s_loss``.
        diagonal_weight: Weight of the diagonal in the paper's form: 2 as printed, or 1.
        c3s_weights: lambda of Eq. 10 for ``last``, ``previous`` and ``merged``; 0 turns a term off. The default is the
            released code's for CUB on ResNet-50; the paper prints no values.
        cross_layer_weights: lambda of Eq. 11 for ``previous`` and ``merged``; 0 turns a term off. Released code: 1.
        detach_teacher: Whether CL's gradients stop at the logits of stage L (they do not in the released code).
        gates: ``sigmoid`` (Eq. 1), ``competing``: a softmax over the excitations for each channel, or ``spatial``: Eq.
            1 times a softmax over the excitations and a background for each position, the same in both stages.
        gate_sharpness: Factor of the scores of competing gates.
        background: Whether one more competing gate, without head and C3S, takes channels that belong to no part.
        c3s_centred: Whether C3S uses features minus their mean over images and excitations.
        separation_weights: For ``last`` and ``previous``, weight of the correlation of the maps of two gates.
        presence_weights: For ``last`` and ``previous``, weight of the absence of excitations from the batch, with
            spatial gates from each image.
        equivariance_weights: For ``last`` and ``previous``, weight of the difference between the maps of an image and
            of a random affine view of it, which takes a second pass of the trunk.
        part_weights: For ``last``, ``previous`` and ``merged``, weight of the cross-entropy of each part alone.
        concentration_weight: Of spatial gates: weight of the spread of each excitation around its centroid.
        border_weight: Of spatial gates: weight of the share of the excitations at the border of the map.
        detach_assignment: Of spatial gates: whether their softmax trains its prototypes only, and not the trunk.
        detach_shares: Of spatial gates: whether the heads train neither prototypes nor, through them, the trunk, so
            that separation, presence, concentration and border alone say what the excitations look at.
        assignment_start: Of spatial gates: ``random`` prototypes, those of ``clusters`` of what is seldom at the border
            of the training images, or ``refined``: moved from there by presence, concentration and border.
        assignment_lr_factor: Of spatial gates: learning rate of the prototypes relative to that of new layers. It lets
            them follow the features that they are compared with.
        whole: Of spatial gates: whether the heads also get one more excitation, which sees every position.
    """

    map_name = "excitation"
    curve_titles: ClassVar = Method.curve_titles | {
        "c3s": "C3S term",
        "cross_layer": "Cross-layer term",
        "s": "Similarity S of the parts (Eq. 3)",
        "separation": "Correlation of the gates' maps",
        "presence": "Absence of excitations",
        "equivariance": "Change under affine views",
        "part": "Classification of each part alone",
        "concentration": "Spread of the parts",
        "border": "Parts at the border",
    }

    citation = """\
@inproceedings{luo2019crossx,
  title     = {Cross-X Learning for Fine-Grained Visual Categorization},
  author    = {Luo, Wei and Yang, Xitong and Mo, Xianjie and Lu, Yuheng and Davis, Larry S. and Li, Jun and Yang, Jian
               and Lim, Ser-Nam},
  booktitle = {ICCV},
  year      = {2019}
}"""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_parts: int = 2,
        reduction: int | Sequence[int] = 16,
        osme_placement: Placement | None = None,
        use_previous: bool = True,
        use_merged: bool = True,
        previous_pooling: Pooling = "max",
        interpolation: Interpolation = "bilinear",
        merged_statistics: MergeStatistics = "map",
        c3s_form: C3SForm = "paper",
        diagonal_weight: float = 2.0,
        c3s_weights: Sequence[float] = (0.5, 0.25, 0.5),
        cross_layer_weights: Sequence[float] = (1.0, 1.0),
        detach_teacher: bool = False,
        gates: Gates = "sigmoid",
        gate_sharpness: float = 10.0,
        background: bool = False,
        c3s_centred: bool = False,
        separation_weights: Sequence[float] = (0.0, 0.0),
        presence_weights: Sequence[float] = (0.0, 0.0),
        equivariance_weights: Sequence[float] = (0.0, 0.0),
        part_weights: Sequence[float] = (0.0, 0.0, 0.0),
        concentration_weight: float = 0.0,
        border_weight: float = 0.0,
        detach_assignment: bool = False,
        detach_shares: bool = False,
        assignment_start: AssignmentStart = "random",
        assignment_lr_factor: float = 1.0,
        whole: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes)

        reductions = [reduction] * 2 if isinstance(reduction, int) else list(reduction)
        by_name("reduction", reductions, STAGES)
        self.c3s_weights = by_name("c3s_weights", c3s_weights, HEADS)
        self.cross_layer_weights = by_name("cross_layer_weights", cross_layer_weights, HEADS[1:])
        self.part_terms = PartTerms(
            gates,
            num_parts,
            separation=separation_weights,
            presence=presence_weights,
            equivariance=equivariance_weights,
            part=part_weights,
            concentration=concentration_weight,
            border=border_weight,
        )
        gating = Gating(gates, gate_sharpness, background)
        if self.part_terms.on_gates:
            if osme_placement == "residual":
                raise UsageError(
                    "osme_placement=residual: the shortcut would bypass what separation and presence do to the gates; "
                    "use output, their default."
                )
            osme_placement = "output"
        if num_parts + background < 2 and any(separation_weights):
            raise UsageError(
                "separation_weights need num_parts 2 or more, or a background: there is one gate."
            )
        used = {"last": True, "previous": use_previous, "merged": use_merged}
        if c3s_centred:
            _check_centred(num_parts, [self.c3s_weights[name] for name, has_head in used.items() if has_head])
        if gates != "spatial":
            _check_not_given(
                {
                    "detach_assignment": detach_assignment,
                    "detach_shares": detach_shares,
                    f"assignment_start {assignment_start}": assignment_start != "random",
                    f"assignment_lr_factor {assignment_lr_factor:g}": assignment_lr_factor != 1,
                    "whole": whole,  # other gates see every position anyway
                }
            )
        check_positive("assignment_lr_factor", assignment_lr_factor)
        self.assignment_start = assignment_start
        self.assignment_lr_factor = assignment_lr_factor
        self.num_parts = num_parts
        excitations = num_parts + whole
        self.previous_pooling: Pooling = previous_pooling
        self.heads = nn.ModuleDict()
        last, previous = backbone.channels["last"], backbone.channels["previous"]
        backbone.attach_osme("last", excitations, reductions[0], osme_placement, gating)
        if use_previous or use_merged:
            backbone.attach_osme("previous", excitations, reductions[1], osme_placement, gating)
        if gates == "spatial":
            if detach_shares and not self.part_terms.on_shares(backbone.osme):
                raise UsageError(
                    "detach_shares: nothing would train the prototypes; give separation_weights, presence_weights, "
                    "concentration_weight or border_weight."
                )
            backbone.attach_assignment(num_parts, detach_assignment, whole, detach_shares)
        backbone.drop_head()
        self.heads["last"] = nn.Linear(excitations * last, num_classes)
        if use_previous:
            self.heads["previous"] = nn.Linear(excitations * previous, num_classes)
        self.merge: MergedFeatures | None = None
        if use_merged:
            self.merge = MergedFeatures(last, previous, excitations, interpolation, merged_statistics)
            self.heads["merged"] = nn.Linear(excitations * previous, num_classes)
        self.c3s = C3SLoss(c3s_form, diagonal_weight, c3s_centred)
        self.cross_layer = CrossLayerLoss(detach_teacher)

    @classmethod
    def published_name(cls, options: Mapping[str, Any]) -> str:
        """Return ``crossx_parts`` with spatial gates, which are not the published method's."""
        return "crossx_parts" if options.get("gates") == "spatial" else cls.name

    def part_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> pooled part features f_p, (B, P, C), for images (B, 3, H, W).

        With ``whole`` there are P + 1, those of the whole last; so in all features and class maps below.
        """
        return self._pool(self.backbone(images))

    def _pool(self, stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = {"last": global_pool(stages["last"], "avg")}
        if "previous" in self.heads:
            features["previous"] = global_pool(stages["previous"], self.previous_pooling)
        if self.merge is not None:
            features["merged"] = self._merge(stages["previous"], stages["last"])
        return features

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> logits (B, K) for images (B, 3, H, W)."""
        return self._classify(self.part_features(images))

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the loss of Eq. 8 with its terms ``data`` (Eq. 9), ``c3s_*`` (Eq. 10) and ``cross_layer_*`` (Eq. 11).

        The further terms, ``separation_*``, ``presence_*``, ``equivariance_*`` and ``part_*``, are those of
        docs/methods/crossx-parts.md. In evaluation mode the affine view is always the same.

        The measures ``s_diagonal_*`` and ``s_off_diagonal_*`` are the means of S (Eq. 3) on and off its diagonal. They
        are logged even if C3S is off.
        """
        maps = self.backbone.ungated(images)
        gates = self.backbone.gates(maps)
        shares = self.backbone.assign(maps)
        stages = self.backbone.excite(maps, gates, shares)
        features = self._pool(stages)
        heads = self._classify(features)
        logits = self.combine_heads(heads)
        terms = self.head_terms(heads, targets)
        measures: dict[str, Tensor] = {}
        for name, pooled in features.items():
            weight = self.c3s_weights[name]
            parts = pooled[:, : self.num_parts]
            s = part_correlations(parts if weight else parts.detach())
            if weight:
                terms[f"c3s_{name}"] = weight * self.c3s.of_correlations(s)
            measures |= {f"s_{mean}_{name}": value for mean, value in summarize_correlations(s).items()}
        if shares is None:
            terms |= self.part_terms.of_gates(maps, gates)
        else:
            terms |= self.part_terms.of_shares(maps, shares, list(gates))
        terms |= self.part_terms.of_views(images, stages, self.backbone, self.training)
        terms |= self.part_terms.of_heads(self.linear_heads(), features, targets, self.criterion)
        return Objective.of(terms, logits, measures)

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start the prototypes of spatial gates from the objects of training images, unless they start at random."""
        assignment = self.backbone.assignment
        if self.assignment_start == "random" or assignment is None:
            return
        collected: list[Tensor] = []
        activations: list[Tensor] = []
        with evaluation_mode(self):
            for images, *_ in batches:
                maps = self.backbone.ungated(images)
                collected.append(self.backbone.assignable(maps).float().cpu())
                whole = maps["previous" if "previous" in self.backbone.osme else "last"]
                activations.append(whole.float().relu().mean(1).cpu())  # (B, C, h, w) -> (B, h, w)
                if sum(map(Tensor.numel, activations)) >= CLUSTERED_POSITIONS:
                    break
        z = torch.cat(collected)
        at_border = outermost(z).flatten().repeat(len(z))  # (h*w,) -> (N*h*w,)
        if at_border.all():
            log.warning(
                "assignment_start %s: all positions of the maps are at the border, so the prototypes start at random. "
                "Larger images have others: --data.image_size.",
                self.assignment_start,
            )
            return
        positions = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, C, h, w) -> (N*h*w, C)
        start = starting_prototypes(positions, at_border, self.num_parts)
        if self.assignment_start == "refined":
            start = refined_prototypes(start, z, torch.cat(activations))
        assignment.prototypes.copy_(start)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return stage name -> channel means of ReLU(U_p), (B, P, h, w), in the order of Fig. 5.

        The stages of a ResNet end in a ReLU, so that these are the channel means of U_p. The merged features, and the
        stages of MobileNetV2, end in a batch norm: half of what a channel says has a negative sign, and the mean over
        channels would be a sum with arbitrary signs, in which opposite responses cancel.
        """
        # without the whole
        return {
            name: looks(features, self.num_parts)
            for name, features in self._attention_features(images).items()
        }

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return head name -> (B, P, h, w), one map per part; see ``Method``.

        With GMP a channel counts only at the position of its maximum, which is all that the head sees.
        """
        maps = {}
        for name, features in self._attention_features(images).items():
            shares = pooled_shares(features, self.previous_pooling if name == "previous" else "avg")
            weights = self.heads[name].get_parameter("weight")[classes]
            weights = weights.view(features.shape[:3])  # (B, P*C) -> (B, P, C)
            maps[name] = torch.einsum("bpchw,bpc->bphw", shares, weights)  # (B, P, C, h, w) -> (B, P, h, w)
        return maps

    def inference_form(self, image_size: int) -> nn.Module:
        """Return the network without five-dimensional tensors, with the merge, its batch norm and its head in one.

        With spatial gates it is the network itself.
        """
        separable = type(self) is CrossX and self.backbone.assignment is None
        return SeparateCrossX(self, image_size) if separable else self

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the part features of all heads, concatenated, (B, D)."""
        # heads x (B, P, C) -> (B, sum of P*C)
        return torch.cat([pooled.flatten(1) for pooled in self.part_features(images).values()], 1)

    def lr_factors(self) -> dict[str, float]:
        """Return the factor of the prototypes of spatial gates."""
        return {"backbone.assignment.": self.assignment_lr_factor}

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return the heads in the order of ``part_features``."""
        return {name: cast(nn.Linear, self.heads[name]) for name in HEADS if name in self.heads}

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``data`` (Eq. 9) and ``cross_layer_*`` (Eq. 11)."""
        terms = super().head_terms(heads, targets)
        for name, weight in self.cross_layer_weights.items():
            if weight and name in heads:
                terms[f"cross_layer_{name}"] = weight * self.cross_layer(heads["last"], heads[name])
        return terms

    def _attention_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> U_p, (B, P, C, h, w), in the order of Fig. 5."""
        stages = self.backbone(images)
        features = {"previous": stages["previous"]} if "previous" in self.heads else {}
        features["last"] = stages["last"]
        if self.merge is not None:
            features["merged"] = self.merge(stages["previous"], stages["last"])
        return features

    def _merge(self, previous: Tensor, last: Tensor) -> Tensor:
        assert self.merge is not None
        if self.backbone.recomputes:
            pooled: Tensor = recompute(self.merge.pooled, previous, last, norms_of=self.merge)
            return pooled
        return self.merge.pooled(previous, last)

    def _classify(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        # (B, P, C) -> (B, P*C) -> (B, K)
        return {name: self.heads[name](pooled.flatten(1)) for name, pooled in features.items()}


class SeparateCrossX(nn.Module):
    """A trained Cross-X for inference, whose parts are maps of their own.

    Args:
        method: The network; it shares its trunk and cannot be used afterwards.
        image_size: Side of the images in pixels.
    """

    def __init__(self, method: CrossX, image_size: int) -> None:
        super().__init__()
        self.backbone = method.backbone
        self.previous_pooling = method.previous_pooling
        self.merge: MergedLogits | None = None
        if method.merge is not None:
            sizes = [method.backbone.map_size(image_size, stage) for stage in ("previous", "last")]
            self.merge = MergedLogits(method.merge, cast(nn.Linear, method.heads["merged"]), *sizes)
        # as convolutions, since some runtimes are slow on matrices of few rows
        self.heads = nn.ModuleDict(
            {
                name: convolution(head.weight, head.bias)
                for name, head in method.linear_heads().items()
                if name != "merged"
            }
        )
        self.backbone.separate_parts()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, 3, H, W)."""
        return self.logits_and_features(images)[0]

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and the features of the head ``last``, see ``Method``."""
        stages: Mapping[str, Sequence[Tensor]] = self.backbone(images)
        features = _pool(stages["last"], "avg")
        logits: Tensor = self.heads["last"](features)
        if "previous" in self.heads:
            logits = logits + self.heads["previous"](_pool(stages["previous"], self.previous_pooling))
        if self.merge is not None:
            logits = logits + self.merge(stages["previous"], stages["last"])
        return logits.flatten(1), features.flatten(1)  # (B, K, 1, 1) -> (B, K), (B, P*C, 1, 1) -> (B, P*C)


def _pool(maps: Sequence[Tensor], pooling: Pooling) -> Tensor:
    pool = F.adaptive_max_pool2d if pooling == "max" else F.adaptive_avg_pool2d
    # P x (B, C, h, w) -> P x (B, C, 1, 1) -> (B, P*C, 1, 1)
    return torch.cat([pool(part, 1) for part in maps], 1)


def _check_centred(num_parts: int, weights: Sequence[float]) -> None:
    """Check that centred C3S, with these weights of the network's heads, has an effect."""
    if num_parts < 2:
        raise UsageError("c3s_centred needs num_parts 2 or more: S of a single centred part is 0.")
    if not any(weights):
        raise UsageError("c3s_centred changes nothing: all c3s_weights of the network's heads are 0.")


def _check_not_given(spatial: Mapping[str, bool]) -> None:
    """Check that no option of spatial gates, name -> whether it is given, goes with other gates."""
    for option, given in spatial.items():
        if given:
            raise UsageError(f"{option} needs spatial gates: --model.gates spatial.")
