"""The network as it is exported: decoded bytes in, logits and probabilities out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossx.data.transforms import Normalize
from crossx.methods.base import Method
from crossx.runs import ModelSpec


class Inference(nn.Module):
    """A method between its normalisation and its softmax, so that whoever runs it needs to know neither.

    Args:
        method: The trained network; put into evaluation mode. It computes in the type of its parameters.
        spec: The description that belongs to it.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, method: Method, spec: ModelSpec) -> None:
        super().__init__()
        self.method = method
        scale, offset = Normalize.constants(spec.preprocessing)
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("offset", offset.view(3, 1, 1))
        self.temperature = spec.temperature
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images as they were decoded, resized and cropped.

        Args:
            images: uint8 RGB (B, 3, S, S).

        Returns:
            float32 logits (B, K), and probabilities (B, K), the softmax of the logits over the run's temperature.
        """
        normalized = images.to(torch.float32) * self.scale + self.offset
        dtype = next(self.method.parameters()).dtype
        logits = self.method(normalized.to(dtype)).to(torch.float32)
        return logits, (logits / self.temperature).softmax(1)
