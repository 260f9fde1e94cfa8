"""The network as it is exported: from uint8 images to logits and probabilities."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from crossx.data.transforms import Normalize
from crossx.evaluation.unknowns import FEATURE_SCORES, similarity
from crossx.methods.base import Method
from crossx.runs import ModelSpec

OUTPUTS = ("logits", "probabilities")
SIMILARITIES = "similarities"
"""Name of a third output, of runs whose rejection needs it."""


class Inference(nn.Module):
    """A method with its normalisation and softmax.

    Args:
        method: The trained network, put into evaluation mode; it computes in the type of its parameters.
        spec: Its description.
    """

    scale: Tensor
    offset: Tensor
    class_means: Tensor | None

    def __init__(self, method: Method, spec: ModelSpec) -> None:
        super().__init__()
        self.method: nn.Module = method
        self.image_size = spec.preprocessing.image_size
        scale, offset = Normalize.constants(spec.preprocessing)
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("offset", offset.view(3, 1, 1))
        self.temperature = spec.temperature
        needed = spec.rejection is not None and spec.rejection.score in FEATURE_SCORES
        self.register_buffer("class_means", method.class_means if needed else None)
        self.eval()

    def use_inference_form(self) -> None:
        """Replace the method by ``Method.inference_form``, for a graph that another runtime executes.

        A form without the features that the rejection needs is not used.
        """
        if isinstance(self.method, Method):
            form = copy.deepcopy(self.method).inference_form(self.image_size)
            if self.class_means is None or hasattr(form, "logits_and_features"):
                self.method = form

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what ``forward`` returns."""
        return OUTPUTS if self.class_means is None else (*OUTPUTS, SIMILARITIES)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify decoded, resized and cropped images.

        Args:
            images: uint8 RGB (B, 3, S, S).

        Returns:
            float32 logits (B, K), probabilities (B, K), the softmax of the logits over the run's temperature, and
            similarities (B,) to the nearest class mean if the run's rejection needs them.
        """
        normalized = images.to(torch.float32) * self.scale + self.offset
        normalized = normalized.to(next(self.method.parameters()).dtype)
        if self.class_means is None:
            logits = self.method(normalized).to(torch.float32)
            return logits, (logits / self.temperature).softmax(1)
        logits, features = cast(Method, self.method).logits_and_features(normalized)
        logits = logits.to(torch.float32)
        return logits, (logits / self.temperature).softmax(1), similarity(features, self.class_means)
