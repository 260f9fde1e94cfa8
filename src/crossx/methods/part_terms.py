"""Terms that make the excitations of Cross-X parts (docs/methods/crossx-parts.md); none is in the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from crossx.backbones import Backbone
from crossx.distributed import at_least_float32
from crossx.errors import UsageError
from crossx.layers import AffineView, enlarge, gate_maps, without_statistics
from crossx.layers.osme import Gates
from crossx.losses import (
    border_loss,
    centroid_concentration_loss,
    image_presence_loss,
    presence_loss,
    relative_presence,
    separation_loss,
    view_loss,
)

HEADS = ("last", "previous", "merged")
STAGES = HEADS[:2]


class PartTerms:
    """The terms ``separation_*``, ``presence_*``, ``equivariance_*``, ``part_*``, ``concentration`` and ``border``.

    Args:
        gates: Kind of the gates; concentration and border need ``spatial`` ones.
        num_parts: P, the excitations with a share of their own.
        separation: For ``last`` and ``previous``, weight of the correlation of the maps of two gates.
        presence: For ``last`` and ``previous``, weight of the absence of excitations.
        equivariance: For ``last`` and ``previous``, weight of the difference between the maps of an image and a view.
        part: For ``last``, ``previous`` and ``merged``, weight of the cross-entropy of each excitation alone.
        concentration: Weight of the spread of each excitation around its centroid.
        border: Weight of the share of the excitations at the border of the map.

    Raises:
        UsageError: If a weight is negative or not finite, if there are too many or too few, or if the gates have no
            such term.
    """

    def __init__(
        self,
        gates: Gates,
        num_parts: int,
        *,
        separation: Sequence[float],
        presence: Sequence[float],
        equivariance: Sequence[float],
        part: Sequence[float],
        concentration: float,
        border: float,
    ) -> None:
        self.num_parts = num_parts
        self.separation = by_name("separation_weights", separation, STAGES)
        self.presence = by_name("presence_weights", presence, STAGES)
        self.equivariance = by_name("equivariance_weights", equivariance, STAGES)
        self.part = by_name("part_weights", part, HEADS)
        self.concentration, self.border = concentration, border
        for name, weight in (("concentration", concentration), ("border", border)):
            if not 0 <= weight < math.inf:
                raise UsageError(f"{name}_weight must be at least 0 and finite, not {weight}.")
            if weight and gates != "spatial":
                raise UsageError(f"{name}_weight needs spatial gates: --model.gates spatial.")

    @property
    def on_gates(self) -> bool:
        """Whether a term is on what the gates do to a stage's map, which a shortcut would bypass."""
        return any((*self.separation.values(), *self.presence.values()))

    def on_shares(self, stages: Iterable[str]) -> bool:
        """Whether a term trains the prototypes of spatial gates on these stages; see ``of_shares``."""
        of_stages = (self.separation[stage] + self.presence[stage] for stage in stages)
        return any((self.concentration, self.border, *of_stages))

    def of_gates(self, maps: Mapping[str, Tensor], gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``separation_*`` and ``presence_*``: what the gates do to maps U that these terms do not train.

        Args:
            maps: Stage -> map U without gates, (B, C, h, w).
            gates: Stage -> gates m, (B, M, C), with M = P, or P + 1 with a background.
        """
        terms = {}
        for stage, gate in gates.items():
            separation, presence = self.separation[stage], self.presence[stage]
            if not (separation or presence):
                continue
            fixed = maps[stage].detach()
            looks = gate_maps(fixed, gate)  # (B, M, h, w)
            everything = gate_maps(fixed, torch.ones_like(gate[:, :1]))[:, 0]  # (B, h, w)
            if separation:
                terms[f"separation_{stage}"] = separation * separation_loss(looks, everything)
            if presence:
                terms[f"presence_{stage}"] = presence * presence_loss(
                    relative_presence(looks[:, : self.num_parts], everything), border=0
                )
        return terms

    def of_shares(
        self, maps: Mapping[str, Tensor], shares: Tensor, stages: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the terms of spatial gates on the shares of the positions.

        Args:
            maps: Stage -> map U without gates, (B, C, h', w').
            shares: a, (B, P + 1, h, w), the last of the background.
            stages: The stages with gates.
        """
        parts, background = shares[:, :-1], shares[:, -1]
        terms = {}
        if self.concentration:
            terms["concentration"] = self.concentration * centroid_concentration_loss(parts)
        if self.border:
            terms["border"] = self.border * border_loss(background)
        for stage in stages:
            separation, presence = self.separation[stage], self.presence[stage]
            if not (separation or presence):
                continue
            u = at_least_float32(maps[stage].detach())
            # (B, C, h', w') -> (B, 1, h', w') -> (B, h, w)
            everything = enlarge(u.relu().mean(1, keepdim=True), shares)[:, 0]
            if separation:
                foreground = everything * (1 - background.detach())
                terms[f"separation_{stage}"] = separation * separation_loss(parts, foreground)
            if presence:
                terms[f"presence_{stage}"] = presence * image_presence_loss(parts, everything)
        return terms

    def of_views(
        self, images: Tensor, stages: Mapping[str, Tensor], backbone: Backbone, drawn: bool
    ) -> dict[str, Tensor]:
        """Return ``equivariance_*``: how the maps of a view differ from those of the images.

        Args:
            images: (B, 3, H, W).
            stages: Stage -> U_p, (B, P, C, h, w), of the images; stages without gates have no term.
            backbone: Its second pass sees the views, and leaves running statistics as they are.
            drawn: Whether the view is random, as in training, or always the same.
        """
        weights = {stage: weight for stage, weight in self.equivariance.items() if weight}
        if not weights:
            return {}
        count, device = len(images), images.device
        if drawn:
            view = AffineView.draw(count, device=device)
        else:
            angle = torch.full((count,), math.pi / 4, device=device)
            view = AffineView(angle, torch.ones_like(angle), torch.zeros(count, 2, device=device))
        # running statistics are for evaluation, which sees no such views
        seen = without_statistics(backbone, view.apply(images))
        terms = {}
        for stage, weight in weights.items():
            if stages[stage].ndim == 5:
                here, there = (looks(maps[stage], self.num_parts) for maps in (stages, seen))
                shown = view.undo(torch.ones_like(here[:, :1]))[:, 0]
                terms[f"equivariance_{stage}"] = weight * view_loss(here, view.undo(there), shown)
        return terms

    def of_heads(
        self,
        heads: Mapping[str, nn.Linear],
        features: Mapping[str, Tensor],
        targets: Tensor,
        criterion: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Return ``part_*``: the mean cross-entropy of a head that sees one excitation, and zeros for the others.

        Args:
            heads: Head name -> classifier of the flattened features.
            features: Head name -> pooled features f_p, (B, P, C).
            targets: (B,) or, if soft, (B, K).
            criterion: Mean loss of logits (B, K) and targets.
        """
        terms = {}
        for name, head in heads.items():
            if weight := self.part[name]:
                # (K, P*C) -> (K, P, C)
                weights = head.weight.unflatten(1, features[name].shape[1:])
                # (B, P, C) and (K, P, C) -> (P, B, K)
                logits = torch.einsum("bpc,kpc->pbk", features[name], weights) + head.bias
                losses = [criterion(part, targets) for part in logits.unbind(0)]
                terms[f"part_{name}"] = weight * torch.stack(losses).mean()
        return terms


def looks(features: Tensor, num_parts: int) -> Tensor:
    """Return the channel means of ReLU(U_p), (B, P, h, w), of the first P of M excitations, (B, M, C, h, w)."""
    return features[:, :num_parts].relu().mean(2)  # (B, M, C, h, w) -> (B, P, h, w)


def by_name(option: str, values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Return name -> weight.

    Raises:
        UsageError: If there are not as many weights as names, or one is negative or not finite.
    """
    if len(values) != len(names):
        raise UsageError(f"{option} takes {len(names)} numbers ({', '.join(names)}), not {len(values)}.")
    if any(value < 0 for value in values):
        raise UsageError(f"{option} must not be negative: {list(values)}.")
    if not all(map(math.isfinite, values)):
        raise UsageError(f"{option} must be finite numbers: {list(values)}.")
    return dict(zip(names, values, strict=True))
