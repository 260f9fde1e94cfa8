"""Probe: simple classifiers on the features of a frozen trunk, the control of every comparison."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone, Layer
from crossx.errors import CrossXError, UsageError
from crossx.methods.base import Method, Objective
from crossx.methods.linear import PENALTY, embed, fit_centred
from crossx.methods.plain import Plain
from crossx.methods.registry import register_method

Head: TypeAlias = Literal["logistic", "sgd", "knn"]

PENALTIES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Penalties to choose from, for features of unit mean square norm."""
HELD_OUT = 5
"""One in so many training images of each class is held out to choose the penalty."""
NO_VOTE = 1e-6
"""Vote of a class without neighbours: its logit must be finite."""

log = logging.getLogger(__name__)


@register_method("probe")
class Probe(Plain):
    """A frozen trunk and a classifier fitted on its features before the first step.

    The trunk is in evaluation mode throughout and receives no gradient. The classifier is fitted on one view of each
    training image, see ``prepare``; ``trainer.max_epochs 0`` leaves it as fitted.

    Args:
        backbone: The trunk.
        num_classes: K.
        head: ``logistic``: multinomial logistic regression, fitted by L-BFGS; ``sgd``: a linear layer that starts at
            random and is trained by the optimiser; ``knn``: the nearest training images by cosine similarity.
        layer: The trunk's features: ``pooled`` for the input of its own classifier, ``fc6`` for the first fully
            connected layer of AlexNet or VGG.
        penalty: L2 penalty of ``logistic``, for features of unit mean square norm. Default: chosen on a fifth of the
            training images, then fitted again on all of them.
        neighbors: k, the number of voting images (``knn`` only). Default: 20.
        temperature: A vote weighs ``exp(similarity / temperature)`` (``knn`` only). Default: 0.07.
    """

    citation = """\
@inproceedings{donahue2014decaf,
  title     = {{DeCAF}: A Deep Convolutional Activation Feature for Generic Visual Recognition},
  author    = {Donahue, Jeff and Jia, Yangqing and Vinyals, Oriol and Hoffman, Judy and Zhang, Ning and others},
  booktitle = {ICML},
  year      = {2014}
}"""

    features: Tensor
    labels: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        head: Head = "logistic",
        layer: Layer = "pooled",
        penalty: float | None = None,
        neighbors: int | None = None,
        temperature: float | None = None,
    ) -> None:
        Method.__init__(self, backbone, num_classes)
        for option, value, owner in (
            ("penalty", penalty, "logistic"),
            ("neighbors", neighbors, "knn"),
            ("temperature", temperature, "knn"),
        ):
            if value is not None and head != owner:
                raise UsageError(f"{option} belongs to head {owner}, not {head}.")
            if value is not None and not value > 0:
                raise UsageError(f"{option} must be above 0, not {value}.")
        width = backbone.layer_channels(layer)
        backbone.requires_grad_(False)
        self.head, self.layer, self.penalty = head, layer, penalty
        self.neighbors = 20 if neighbors is None else neighbors
        if head == "knn":
            # a parameter, because an optimiser and several processes need one
            self.temperature = nn.Parameter(torch.tensor(0.07 if temperature is None else float(temperature)))
            self.register_buffer("features", torch.zeros(0, width))
            self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        else:
            self.classifier = nn.Linear(width, num_classes)

    def train(self, mode: bool = True) -> Probe:
        """Set training mode, except for the trunk."""
        super().train(mode)
        self.backbone.eval()
        return self

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features, (B, D), that the classifier sees."""
        return self.backbone.pool(self.backbone.features(images), self.layer)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> logits (B, K) for images (B, 3, H, W); for ``knn`` the logarithm of the votes."""
        if self.head != "knn":
            return super().head_logits(images)
        return {"last": self._vote(self.embeddings(images)).clamp(min=NO_VOTE).log()}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the cross-entropy; see ``Method.objective``.

        Raises:
            UsageError: For ``knn``, which has nothing to train.
        """
        if self.head == "knn":
            raise UsageError("model.head knn has nothing to train: give --trainer.max_epochs 0.")
        return super().objective(images, targets)

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        """Return ``last`` -> (B, 1, h, w), or None for ``knn`` and features that are no average of the last map."""
        return None if self.head == "knn" else super().class_activation_maps(images, classes)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return ``last`` -> classifier; none for ``knn``."""
        return {} if self.head == "knn" else super().linear_heads()

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compute the features of the training images, and fit the classifier on them or store them.

        A fifth of each class's images is held out to choose the penalty with the highest accuracy on them (ties: the
        lowest cross-entropy). Classes of fewer than five images have none; if no class has any, ``PENALTY`` is used.
        """
        if self.head == "sgd":
            return
        features, targets = embed(self, batches)
        if self.head == "knn":
            self.features, self.labels = F.normalize(features), targets
            return
        penalty = self.penalty or self._choose_penalty(features, targets)
        weight, bias = self._fit(features, targets, penalty)
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.copy_(bias)

    def adapt_to(self, state: Mapping[str, Tensor]) -> None:
        """Take over the number of images that a state dict stores for ``knn``.

        Raises:
            CrossXError: If their labels are no classes.
        """
        if self.head != "knn" or not {"features", "labels"} <= state.keys():
            return
        features, labels = state["features"], state["labels"]
        if labels.ndim != 1 or features.shape != (len(labels), self.features.shape[1]):
            return
        if labels.is_floating_point() or ((labels < 0) | (labels >= self.num_classes)).any():
            raise CrossXError(f"the labels of its stored images are not from 0 to {self.num_classes - 1}.")
        self.features = self.features.new_zeros(features.shape)
        self.labels = self.labels.new_zeros(labels.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {
            name: state_dict[prefix + name] for name in ("features", "labels") if prefix + name in state_dict
        }
        self.adapt_to(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit(self, features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Return weight (K, D) and bias (K,)."""
        return fit_centred(
            {"last": features},
            self.num_classes,
            penalty,
            lambda logits: self.criterion(logits["last"], targets),
        )["last"]

    def _choose_penalty(self, features: Tensor, targets: Tensor) -> float:
        held_out = _held_out(targets)
        if not held_out.any():
            log.info("probe: penalty %g; no class has %d images to choose one.", PENALTY, HELD_OUT)
            return PENALTY
        scores = []
        for penalty in PENALTIES:
            fitted = self._fit(features[~held_out], targets[~held_out], penalty)
            logits = F.linear(features[held_out], *fitted)
            correct = (logits.argmax(1) == targets[held_out]).float().mean()
            scores.append((float(correct), -float(F.cross_entropy(logits, targets[held_out])), penalty))
        accuracy, _, penalty = max(scores)
        log.info(
            "probe: penalty %g, with %.1f%% of %d held-out training images correct.",
            penalty, 100 * accuracy, int(held_out.sum()),
        )  # fmt: skip
        return penalty

    def _vote(self, features: Tensor) -> Tensor:
        """Return the share of the votes of each class, (B, K), for features (B, D)."""
        similarities = F.normalize(features) @ self.features.to(features.dtype).T  # (B, D) @ (D, N) -> (B, N)
        nearest, indices = similarities.topk(min(self.neighbors, len(self.labels)))  # -> (B, k)
        weights = torch.softmax(nearest.float() / self.temperature, 1)
        votes = weights.new_zeros(len(features), self.num_classes)
        return votes.scatter_add(1, self.labels[indices], weights)  # (B, k) -> (B, K)


def _held_out(targets: Tensor) -> Tensor:
    """Return a mask of the first fifth of each class's images, (N,)."""
    held_out = torch.zeros_like(targets, dtype=torch.bool)
    for label in targets.unique():
        own = (targets == label).nonzero().flatten()
        held_out[own[: len(own) // HELD_OUT]] = True
    return held_out
