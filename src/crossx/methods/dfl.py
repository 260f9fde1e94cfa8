"""DFL-CNN (Wang, Morariu and Davis, CVPR 2018, https://arxiv.org/abs/1611.09932): a discriminative filter bank."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.errors import UsageError, check_choice
from crossx.layers import FilterBank, energy_peaks, evaluation_mode, global_pool
from crossx.layers.pooling import pooled_shares
from crossx.methods.base import Method, Objective, register_method

FilterNorm: TypeAlias = Literal["none", "batch"]
FilterInit: TypeAlias = Literal["kmeans", "random"]

PEAKS_PER_IMAGE = 10
IMAGES_PER_CLASS = 30
"""Images of a class that its filters start from: about all that CUB has."""
MAX_PEAKS = 200_000
"""Peaks held in memory over all classes: with many classes fewer images of each are taken."""
KMEANS_ITERATIONS = 50

log = logging.getLogger(__name__)


@register_method("dfl")
class DFL(Method):
    """Three classifiers on one trunk: the whole image (G), the best patch of each filter (P), a class's own filters.

    Args:
        backbone: The trunk.
        num_classes: K.
        num_filters: k, filters a class.
        filter_stride: Stride of the map that the filters see; the deepest of that stride is taken. Default: the
            backbone's ``previous``, stride 16 on ResNet; 8 is the paper's with VGG-16 (conv4_3).
        filter_norm: ``none``, or ``batch``: batch norm between filters and pooling.
        filter_init: ``kmeans``: ``prepare`` starts the filters of a class from its images; ``random``: it does not.
        side_weight: Weight of the side branch, in the loss and in the prediction; 0 leaves it out.
        predict_with_side: Whether the side branch counts in the prediction.

    Raises:
        UsageError: For an option that cannot work.
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
        check_choice("filter_norm", filter_norm, get_args(FilterNorm))
        check_choice("filter_init", filter_init, get_args(FilterInit))
        if num_filters < 1:
            raise UsageError(f"num_filters must be at least 1, not {num_filters}.")
        if side_weight < 0:
            raise UsageError(f"side_weight takes no negative number: {side_weight}.")
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
        """Return ``whole``, ``part`` and ``side`` -> logits (B, K), the last with its weight."""
        return self._predicting(self._branch_logits(*self._features(images)))

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of the branches' cross-entropies, each on its own logits, the side branch's weighted."""
        branches = self._branch_logits(*self._features(images))
        terms = {
            "data_whole": self.criterion(branches["whole"], targets),
            "data_part": self.criterion(branches["part"], targets),
        }
        if self.side_weight:
            terms["data_side"] = self.side_weight * self.criterion(branches["side"], targets)
        return Objective.of(terms, self.combine_heads(self._predicting(branches)))

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return stage name -> (B, 1, h, w).

        ``previous`` is the mean response of the predicted class's filters, ``last`` the channel mean.
        """
        responses, last = self._maps(images)
        pooled = global_pool(responses, "max"), last.mean((2, 3))
        predicted = self.combine_heads(self._predicting(self._branch_logits(*pooled))).argmax(1)
        own = _of_class(responses, predicted)
        return {"previous": own.mean(1, keepdim=True), "last": last.mean(1, keepdim=True)}

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return head name -> (B, 1, h, w); see ``Method``.

        A filter counts at its largest place alone, with the weight of all places: what ``part`` and ``side`` use.
        """
        responses, last = self._maps(images)
        shares = pooled_shares(responses, "max")
        weights = self.heads["whole"].get_parameter("weight")[classes]
        maps = {"whole": torch.einsum("bchw,bc->bhw", last, weights)[:, None]}
        weights = self.heads["part"].get_parameter("weight")[classes].unflatten(1, self.filters.groups)
        maps["part"] = torch.einsum("bcfhw,bcf->bhw", shares, weights)[:, None]
        maps["side"] = _of_class(shares, classes).mean(1, keepdim=True)
        return self._predicting(maps)

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the pooled last map and the pooled responses, joined, (B, C + K k)."""
        pooled, whole = self._features(images)
        return torch.cat([whole, pooled.flatten(1)], 1)

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start the filters of each class from what its images show where the trunk responds most.

        The features at the peaks of the energy maps are clustered by k-means; the centres become the filters, all of
        one length, so that a patch of average energy in a centre's direction has the response 1.
        """
        if self.filter_init == "random":
            return
        with evaluation_mode(self):
            peaks = self._collect_peaks(batches)
        seen = [features for features in peaks if len(features)]
        if len(seen) < len(peaks):
            log.warning("%d classes show no peaks: their filters start at random.", len(peaks) - len(seen))
        if not seen:
            return
        energy = torch.cat([features.norm(dim=1) for features in seen]).mean()
        for label, features in enumerate(peaks):
            if len(features):
                centers = cluster_centers(features, self.filters.groups[1], seed=label)
                self.filters.set_filters(label, F.normalize(centers) / energy)

    def _collect_peaks(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return each class's features (n, C) at the peaks of the first images of it, on the CPU."""
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
        """Return the filters' responses (B, K, k, h, w) and the last map (B, C, h', w')."""
        stages = self.backbone(images)
        return self.filters(stages["previous"]), stages["last"]

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled responses (B, K, k) and the pooled last map (B, C)."""
        responses, last = self._maps(images)
        return global_pool(responses, "max"), last.mean((2, 3))

    def _branch_logits(self, pooled: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """Return each branch's own logits; the side branch's are the means of a class's filters."""
        return {
            "whole": self.heads["whole"](whole),
            "part": self.heads["part"](pooled.flatten(1)),
            "side": pooled.mean(2),
        }

    def _predicting(self, branches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return of each branch's logits, or maps, those that count in the prediction, weighted."""
        heads = {name: branches[name] for name in ("whole", "part")}
        if self.predict_with_side and self.side_weight:
            heads["side"] = self.side_weight * branches["side"]
        return heads


def cluster_centers(features: Tensor, count: int, seed: int) -> Tensor:
    """Return the centres (count, C) of k-means on features (n, C), n at least 1.

    Where fewer than ``count`` features differ, they are the centres, and some come again. Filters that start alike
    part ways in training, for the classifier weighs them differently from the start.
    """
    features = features.unique(dim=0)
    if len(features) <= count:
        return features[torch.arange(count) % len(features)]
    # takes half a second to import, which only training from k-means needs
    from scipy.cluster.vq import kmeans2

    with warnings.catch_warnings():
        # an empty cluster keeps its last centre
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, _ = kmeans2(features.double().numpy(), count, iter=KMEANS_ITERATIONS, minit="++", rng=seed)
    return torch.from_numpy(centers).to(features.dtype)


def _of_class(responses: Tensor, classes: Tensor) -> Tensor:
    """Return of responses (B, K, k, h, w) those of one class an image, (B, k, h, w)."""
    return responses[torch.arange(len(classes), device=classes.device), classes]
