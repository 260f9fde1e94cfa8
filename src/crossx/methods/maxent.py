"""Maximum-entropy fine-grained classification (Dubey et al., NeurIPS 2018, https://arxiv.org/abs/1809.05934)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from crossx.backbones import Backbone
from crossx.errors import UsageError
from crossx.losses import EntropyLoss
from crossx.methods.base import Objective
from crossx.methods.plain import Plain
from crossx.methods.registry import register_method


@register_method("maxent")
class MaxEnt(Plain):
    """The plain network trained with ``cross-entropy - gamma H(p)``, where H is the entropy of its softmax p.

    Args:
        backbone: The trunk.
        num_classes: K.
        gamma: Weight of the entropy in nats. The paper selects it on validation images and finds that a wide range
            works; 1 is the value that Zheng et al. (https://arxiv.org/abs/2011.10951, appendix) selected for this term.

    Raises:
        UsageError: If ``gamma`` is negative or not finite.
    """

    citation = """\
@inproceedings{dubey2018maximum,
  title     = {Maximum-Entropy Fine Grained Classification},
  author    = {Dubey, Abhimanyu and Gupta, Otkrist and Raskar, Ramesh and Naik, Nikhil},
  booktitle = {NeurIPS},
  year      = {2018}
}"""

    def __init__(self, backbone: Backbone, num_classes: int, *, gamma: float = 1.0) -> None:
        super().__init__(backbone, num_classes)
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise UsageError(f"gamma must be a finite number of at least 0, not {gamma}.")
        self.gamma = gamma
        self.entropy = EntropyLoss()

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``data`` and ``max_entropy``."""
        negative = self.entropy(self.combine_heads(heads))
        return {**super().head_terms(heads, targets), "max_entropy": self.gamma * negative}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the loss with the terms ``data`` and ``max_entropy``; the entropy itself is a measure."""
        heads = self.head_logits(images)
        logits = self.combine_heads(heads)
        entropy = -self.entropy(logits).detach()
        return Objective.of(self.head_terms(heads, targets), logits, {"entropy": entropy})
