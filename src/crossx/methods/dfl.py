"""DFL-CNN: a discriminative filter bank (Wang et al., CVPR 2018, https://arxiv.org/abs/1611.09932)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.errors import UsageError
from crossx.layers import FilterBank, energy_peaks, evaluation_mode, global_pool
from crossx.layers.pooling import pooled_shares
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method

FilterNorm: TypeAlias = Literal["none", "batch"]
FilterInit: TypeAlias = Literal["kmeans", "random"]

PEAKS_PER_IMAGE = 10
IMAGES_PER_CLASS = 30
"""Images per class from which its filters are initialised: about all that CUB has."""
MAX_PEAKS = 200_000
"""Limit of the peaks in memory over all classes; with many classes, fewer images per class are used."""
KMEANS_ITERATIONS = 50

log = logging.getLogger(__name__)


@register_method("dfl")
class DFL(Method):
    """Three branches on one trunk: the whole image (G), the best patch of each filter (P) and a side branch.

    Args:
        backbone: The trunk.
        num_classes: K.
        num_filters: k, the number of filters per class.
        filter_stride: Stride of the map that the filters see; the deepest map of that stride is used. Default: the
            backbone's ``previous``, stride 16 on ResNet. The paper uses 8 with VGG-16 (conv4_3).
        filter_norm: ``none``, or ``batch`` for batch norm between filters and pooling.
        filter_init: ``kmeans``: initialise the filters of a class from its images; ``random``: do not.
        side_weight: Weight of the side branch in the loss and the prediction; 0 turns it off.
        predict_with_side: Whether the side branch contributes to the prediction.
    """

    citation = """\
@inproceedings{wang2018learning,
  title     = {Learning a Discriminative Filter Bank within a CNN for Fine-grained Recognition},
  author    = {Wang, Yaming and Morariu, Vlad I. and Davis, Larry S.},
  booktitle = {CVPR},
  year      = {2018}
}"""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_filters: int = 10,
        filter_stride: int | None = None,
        filter_norm: FilterNorm = "none",
        filter_init: FilterInit = "kmeans",
        side_weight: float = 0.1,
        predict_with_side: bool = True,
    ) -> None:
        super().__init__(backbone, num_classes)

        if num_filters < 1:
            raise UsageError(f"num_filters must be at least 1, not {num_filters}.")
        if side_weight < 0:
            raise UsageError(f"side_weight must be at least 0, not {side_weight}.")
        self.filter_init = filter_init
        self.side_weight = side_weight
        self.predict_with_side = predict_with_side
        if filter_stride is not None:
            backbone.take_previous(filter_stride)
        backbone.drop_head()
        self.filters = FilterBank(
            backbone.channels["previous"], num_classes, num_filters, filter_norm == "batch"
        )
        self.heads = nn.ModuleDict(
            {
                "whole": nn.Linear(backbone.channels["last"], num_classes),
                "part": nn.Linear(num_classes * num_filters, num_classes),
            }
        )

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of ``whole``, ``part`` and, weighted, ``side``."""
        return self._predicting(self._branch_logits(*self._features(images)))

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of the branches' cross-entropies; the side branch is weighted."""
        branches = self._branch_logits(*self._features(images))
        terms = self.head_terms(branches, targets)
        if self.side_weight:
            terms["data_side"] = self.side_weight * self.criterion(branches["side"], targets)
        return Objective.of(terms, self.combine_heads(self._predicting(branches)))

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return stage name -> (B, 1, h, w).

        ``previous`` is the mean response of the filters of the predicted class, ``last`` the channel mean.
        """
        responses, last = self._maps(images)
        pooled = global_pool(responses, "max"), last.mean((2, 3))  # (B, K, k, h, w) -> (B, K, k); (B, C)
        predicted = self.combine_heads(self._predicting(self._branch_logits(*pooled))).argmax(1)
        own = _of_class(responses, predicted)
        # (B, k, h, w) -> (B, 1, h, w); (B, C, h', w') -> (B, 1, h', w')
        return {"previous": own.mean(1, keepdim=True), "last": last.mean(1, keepdim=True)}

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return head name -> (B, 1, h, w); see ``Method``.

        A filter counts only at the position of its maximum, which is all that ``part`` and ``side`` see.
        """
        responses, last = self._maps(images)
        shares = pooled_shares(responses, "max")
        weights = self.heads["whole"].get_parameter("weight")[classes]
        maps = {"whole": torch.einsum("bchw,bc->bhw", last, weights)[:, None]}  # (B, C, h, w) -> (B, 1, h, w)
        weights = self.heads["part"].get_parameter("weight")[classes]
        weights = weights.unflatten(1, self.filters.groups)  # (B, K*k) -> (B, K, k)
        maps["part"] = torch.einsum("bcfhw,bcf->bhw", shares, weights)[
            :, None
        ]  # (B, K, k, h, w) -> (B, 1, h, w)
        maps["side"] = _of_class(shares, classes).mean(1, keepdim=True)  # (B, k, h, w) -> (B, 1, h, w)
        return self._predicting(maps)

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the pooled last map and the pooled responses, concatenated, (B, C + K k)."""
        pooled, whole = self._features(images)
        return torch.cat([whole, pooled.flatten(1)], 1)  # (B, C) and (B, K, k) -> (B, C + K*k)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return the classifiers of the ``whole`` image and of the filters' responses, ``part``."""
        return dict(self.heads.items())  # type: ignore[arg-type]

    def heads_and_features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits of all branches, and the inputs of the linear heads; see ``Method``."""
        pooled, whole = self._features(images)
        heads = self._predicting(self._branch_logits(pooled, whole))
        return heads, torch.cat([whole, pooled.flatten(1)], 1)  # (B, C) and (B, K, k) -> (B, C + K*k)

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropies of both classifiers, ``data_whole`` and ``data_part``."""
        return {f"data_{name}": self.criterion(heads[name], targets) for name in self.heads}

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Initialise the filters of each class from the patches of its images that the trunk responds to most.

        The features at the peaks of the energy maps are clustered by k-means. The centres, scaled to equal length,
        become the filters: a patch of average energy in a centre's direction has response 1.
        """
        if self.filter_init == "random":
            return
        with evaluation_mode(self):
            peaks = self._collect_peaks(batches)
        seen = [features for features in peaks if len(features)]
        if len(seen) < len(peaks):
            log.warning("%d classes have no peaks: their filters start at random.", len(peaks) - len(seen))
        if not seen:
            return
        energy = torch.cat([features.norm(dim=1) for features in seen]).mean()
        for label, features in enumerate(peaks):
            if len(features):
                centers = cluster_centers(features, self.filters.groups[1], seed=label)
                self.filters.set_filters(label, F.normalize(centers) / energy)

    def _collect_peaks(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return, per class, the features (n, C) at the peaks of its first images, on the CPU."""
        wanted = min(IMAGES_PER_CLASS, max(1, MAX_PEAKS // (PEAKS_PER_IMAGE * self.num_classes)))
        found: list[list[Tensor]] = [[] for _ in range(self.num_classes)]
        for images, targets in batches:
            maps = self.backbone(images)["previous"].float()
            peaks = energy_peaks(maps, PEAKS_PER_IMAGE)
            for label, features in zip(targets.tolist(), peaks, strict=True):
                if len(found[label]) < wanted:
                    found[label].append(features.cpu())
            if all(len(images_of_class) == wanted for images_of_class in found):
                break
        empty = torch.empty(0, self.backbone.channels["previous"])
        return [torch.cat([empty, *images_of_class]) for images_of_class in found]

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the filter responses (B, K, k, h, w) and the last map (B, C, h', w')."""
        stages = self.backbone(images)
        return self.filters(stages["previous"]), stages["last"]

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled responses (B, K, k) and the pooled last map (B, C)."""
        responses, last = self._maps(images)
        return global_pool(responses, "max"), last.mean((2, 3))  # (B, C, h', w') -> (B, C)

    def _branch_logits(self, pooled: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """Return the logits of each branch; the side branch averages the filters of a class."""
        return {
            "whole": self.heads["whole"](whole),
            "part": self.heads["part"](pooled.flatten(1)),  # (B, K, k) -> (B, K*k) -> (B, K)
            "side": pooled.mean(2),  # (B, K, k) -> (B, K)
        }

    def _predicting(self, branches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Select the branches that contribute to the prediction, and weight their logits or maps."""
        heads = {name: branches[name] for name in ("whole", "part")}
        if self.predict_with_side and self.side_weight:
            heads["side"] = self.side_weight * branches["side"]
        return heads


def cluster_centers(features: Tensor, count: int, seed: int) -> Tensor:
    """Return the k-means centres, (count, C), of features (n, C), n at least 1.

    If there are at most ``count`` distinct features, they are the centres and some are repeated; duplicates diverge in
    training because the classifier weights them differently.
    """
    features = features.unique(dim=0)
    if len(features) <= count:
        return features[torch.arange(count) % len(features)]
    # imported here because it takes half a second and only training needs it
    from scipy.cluster.vq import kmeans2

    with warnings.catch_warnings():
        # an empty cluster keeps its last centre
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, _ = kmeans2(features.double().numpy(), count, iter=KMEANS_ITERATIONS, minit="++", rng=seed)
    return torch.from_numpy(centers).to(features.dtype)


def _of_class(responses: Tensor, classes: Tensor) -> Tensor:
    """Select one class per image from responses (B, K, k, h, w)."""
    # (B, K, k, h, w) -> (B, k, h, w)
    return responses[torch.arange(len(classes), device=classes.device), classes]
