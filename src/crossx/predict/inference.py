"""The network as it is exported: from uint8 images to logits and probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossx.data.transforms import Normalize
from crossx.methods.base import Method
from crossx.runs import ModelSpec


class Inference(nn.Module):
    """A method with its normalisation and softmax.

    Args:
        method: The trained network, put into evaluation mode; it computes in the type of its parameters.
        spec: Its description.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, method: Method, spec: ModelSpec) -> None:
        super().__init__()
        self.method: nn.Module = method
        self.image_size = spec.preprocessing.image_size
        scale, offset = Normalize.constants(spec.preprocessing)
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("offset", offset.view(3, 1, 1))
        self.temperature = spec.temperature
        self.eval()

    def use_inference_form(self) -> None:
        """Replace the method by ``Method.inference_form``, for a graph that another runtime executes."""
        if isinstance(self.method, Method):
            self.method = self.method.inference_form(self.image_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify decoded, resized and cropped images.

        Args:
            images: uint8 RGB (B, 3, S, S).

        Returns:
            float32 logits (B, K), and probabilities (B, K), the softmax of the logits over the run's temperature.
        """
        normalized = images.to(torch.float32) * self.scale + self.offset
        dtype = next(self.method.parameters()).dtype
        logits = self.method(normalized.to(dtype)).to(torch.float32)
        return logits, (logits / self.temperature).softmax(1)
