"""Kernel Pooling (Cui et al., CVPR 2017), with compact and full bilinear pooling as its special cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.distributed import at_least_float32
from crossx.errors import UsageError
from crossx.layers import BilinearPooling, TaylorSeriesKernel, TensorSketch, evaluation_mode, signed_sqrt
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method

Pooling: TypeAlias = Literal["kernel", "compact_bilinear", "bilinear"]

GAMMA_BATCHES = 32
"""Number of training batches from which ``prepare`` estimates gamma."""

CITATIONS: Mapping[Pooling, str] = {
    "kernel": """\
@inproceedings{cui2017kernel,
  title     = {Kernel Pooling for Convolutional Neural Networks},
  author    = {Cui, Yin and Zhou, Feng and Wang, Jiang and Liu, Xiao and Lin, Yuanqing and Belongie, Serge},
  booktitle = {CVPR},
  year      = {2017}
}""",
    "compact_bilinear": """\
@inproceedings{gao2016compact,
  title     = {Compact Bilinear Pooling},
  author    = {Gao, Yang and Beijbom, Oscar and Zhang, Ning and Darrell, Trevor},
  booktitle = {CVPR},
  year      = {2016}
}""",
    "bilinear": """\
@inproceedings{lin2015bilinear,
  title     = {Bilinear {CNN} Models for Fine-grained Visual Recognition},
  author    = {Lin, Tsung-Yu and RoyChowdhury, Aruni and Maji, Subhransu},
  booktitle = {ICCV},
  year      = {2015}
}""",
}


@register_method("kernel_pooling")
class KernelPooling(Method):
    """A linear classifier on pooled products of a map's features, trained with cross-entropy.

    The pooled products are followed by a signed square root and L2 normalisation.

    Args:
        backbone: The trunk.
        num_classes: K.
        pooling: ``kernel``: Taylor series of a Gaussian kernel (Cui et al., CVPR 2017); ``compact_bilinear``: Tensor
            Sketch of the outer product (Gao et al., CVPR 2016); ``bilinear``: the outer product itself (B-CNN; Lin et
            al., ICCV 2015).
        order: p, the last order of the series (``kernel`` only). Default: 4, as in the paper.
        sketch_size: d, the length of each sketch. Default: 4096 for ``kernel``, 8192 for ``compact_bilinear``, as in
            the papers.
        gamma: Parameter of the Gaussian kernel that the composition starts from (``kernel`` only). Default: the inverse
            mean inner product of an image's features, estimated on training images before the first step.
        stride: Stride of the pooled map; the deepest map of that stride is used. Default: the last map's. B-CNN uses 16
            on VGG-16 (conv5_3). Deeper layers of the trunk get no gradient.
        channels: Reduce the pooled map to this number of channels by a 1x1 convolution. Default: no reduction.
        normalize_features: Whether to L2-normalise the features of each spatial position before multiplying them.
            Default: only for ``kernel``, whose series requires unit vectors.
        feature_norm: Length of the pooled vector after normalisation. The papers use 1 and, in public B-CNN code, a
            learning rate for the classifier 100 times that of the trunk; with 10 both learn at the same rate.
        sketch_seed: Seed of the sketches' hashes and signs.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        pooling: Pooling = "kernel",
        order: int | None = None,
        sketch_size: int | None = None,
        gamma: float | None = None,
        stride: int | None = None,
        channels: int | None = None,
        normalize_features: bool | None = None,
        feature_norm: float = 10.0,
        sketch_seed: int = 0,
    ) -> None:
        super().__init__(backbone, num_classes)
        for option, value, poolings in (
            ("order", order, ("kernel",)),
            ("gamma", gamma, ("kernel",)),
            ("sketch_size", sketch_size, ("kernel", "compact_bilinear")),
        ):
            if value is not None and pooling not in poolings:
                raise UsageError(f"{option} belongs to pooling {' and '.join(poolings)}, not {pooling}.")
        self.stage = "last" if stride in (None, backbone.strides["last"]) else "previous"
        if stride is not None and self.stage == "previous":
            backbone.take_previous(stride)
        width = backbone.channels[self.stage]
        if channels is not None and not 1 <= channels <= width:
            raise UsageError(
                f"channels must be between 1 and the {self.stage} map's {width}, not {channels}."
            )
        if not feature_norm > 0:
            raise UsageError(f"feature_norm must be above 0, not {feature_norm}.")
        self.citation = CITATIONS[pooling]
        backbone.drop_head()
        if self.stage == "previous":
            backbone.freeze_after_previous()
        self.reduce = nn.Identity() if channels is None else _reduction(width, channels)
        self.normalize_features = pooling == "kernel" if normalize_features is None else normalize_features
        self.feature_norm = feature_norm
        self.estimates_gamma = gamma is None
        width = width if channels is None else channels
        self.pool: nn.Module
        if pooling == "kernel":
            order = 4 if order is None else order
            size = 4096 if sketch_size is None else sketch_size
            self.pool = TaylorSeriesKernel(width, order, size, 1.0 if gamma is None else gamma, sketch_seed)
            pooled = 1 + width + (order - 1) * size
        elif pooling == "compact_bilinear":
            pooled = 8192 if sketch_size is None else sketch_size
            self.pool = TensorSketch(width, pooled, 2, sketch_seed)
        else:
            pooled = width * width
            self.pool = BilinearPooling()
        self.classifier = nn.Linear(pooled, num_classes)

    @classmethod
    def published_name(cls, options: Mapping[str, Any]) -> str:
        """Return ``bilinear`` or ``compact_bilinear`` for these special cases, which are published methods."""
        pooling = str(options.get("pooling", "kernel"))
        return cls.name if pooling == "kernel" else pooling

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> logits (B, K) for images (B, 3, H, W)."""
        return {"last": self.classifier(self.embeddings(images).to(self.classifier.weight.dtype))}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the cross-entropy; see ``Method.objective``."""
        logits = self(images)
        return Objective.of({"data": self.criterion(logits, targets)}, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last``, or ``previous`` with another stride -> the channel mean of the pooled map, (B, 1, h, w)."""
        # (B, C, h, w) -> (B, 1, h, w)
        return {self.stage: self.backbone(images)[self.stage].mean(1, keepdim=True)}

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return ``last`` -> classifier."""
        return {"last": self.classifier}

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the normalised features, (B, D), that the classifier sees."""
        maps = self.reduce(self.backbone(images)[self.stage])
        # products of up to p features overflow half precision, and bfloat16 has no Fourier transform
        with torch.autocast(maps.device.type, enabled=False):
            pooled: Tensor = self.pool(self._local_features(maps)).flatten(1)  # (B, D) or (B, C, C) -> (B, D)
            return self.feature_norm * F.normalize(signed_sqrt(pooled))

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Estimate gamma as the inverse mean inner product of an image's features, unless it is given."""
        if not (self.estimates_gamma and isinstance(self.pool, TaylorSeriesKernel)):
            return
        similarities = []
        with evaluation_mode(self), torch.no_grad():
            for images, _ in islice(batches, GAMMA_BATCHES):
                features = self._local_features(self.reduce(self.backbone(images)[self.stage]))
                # the mean over all pairs of spatial positions: (B, N, C) -> (B, C) -> (B,)
                similarities.append(features.mean(1).square().sum(1))
        self.pool.start_from(1 / float(torch.cat(similarities).mean()))

    def _local_features(self, maps: Tensor) -> Tensor:
        features = at_least_float32(maps.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, h*w, C)
        return F.normalize(features, dim=2) if self.normalize_features else features


def _reduction(channels: int, reduced: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, reduced, 1, bias=False)
    # orthogonal rows preserve inner products best among random projections
    nn.init.orthogonal_(convolution.weight)
    return convolution
