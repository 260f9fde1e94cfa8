"""Join the features of several views of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.distributed import at_least_float32


def join_normalized(features: Sequence[Tensor]) -> Tensor:
    """Return features, n times (B, C), concatenated with equal lengths, (B, n C).

    The result has the length ``C ** 0.5``, about that of one unnormalised feature vector, so that a linear layer on it
    learns at the rate of one on a single view.
    """
    length = (features[0].shape[1] / len(features)) ** 0.5
    normalized = [F.normalize(at_least_float32(own)) * length for own in features]
    return torch.cat(normalized, 1).to(features[0].dtype)
