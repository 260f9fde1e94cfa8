"""One interface to trained networks: PyTorch here, exported files in ``predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from crossx.errors import CrossXError, unknown
from crossx.evaluation.device import select_device
from crossx.evaluation.unknowns import similarity
from crossx.explain.maps import Explanation, Kind, explain_images
from crossx.methods.base import Method

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Network(Protocol):
    """A trained network that takes decoded, resized and cropped images: uint8 RGB (B, 3, S, S).

    Similarities are the cosines to the nearest class mean (``crossx.evaluation.unknowns``).

    ``method``, ``embeddings`` and ``maps`` raise ``UsageError`` if ``explains`` is false; all computations raise
    ``CrossXError`` if GPU memory runs out.
    """

    @property
    def device(self) -> torch.device:
        """The device it computes on."""

    @property
    def precision(self) -> torch.dtype:
        """The precision it computes in."""

    @property
    def explains(self) -> bool:
        """Whether it has ``method``, ``embeddings`` and ``maps``; exported files only have logits."""

    @property
    def method(self) -> Method:
        """The method."""

    def logits(self, images: Tensor) -> Tensor:
        """Return logits, float32 (B, K) on ``device``."""

    @property
    def has_similarities(self) -> bool:
        """Whether it has class means."""

    def logits_and_similarities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and similarities, float32 (B,), on ``device``; only if it has them."""

    def embeddings(self, images: Tensor) -> Tensor:
        """Return ``Method.embeddings``, float32 (B, D) on ``device``."""

    def maps(
        self, images: Tensor, kind: Kind, classes: int | None, probabilities: Tensor
    ) -> list[Explanation]:
        """Return the maps of each image; arguments and errors as in ``explain_images``."""


class TorchNetwork:
    """A method on a device, in evaluation mode.

    Args:
        method: The trained method; it is moved to ``device`` and put into evaluation mode.
        normalize: Turns uint8 images (B, 3, S, S) into the method's input, see ``Normalize``; None if they are already
            normalised.
        device: See ``select_device``.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto``: fp16 on a GPU that is fast in it (compute capability 7
            or above), else fp32. fp16 has eight times the resolution of bf16; a batch that exceeds its range is
            computed again in fp32. Parameters stay float32 (``torch.autocast``).
        channels_last: Whether to use the channels-last memory format, which makes convolutions faster; logits are the
            same up to rounding.

    Raises:
        UsageError: For an unknown device or precision.
    """

    explains = True

    def __init__(
        self,
        method: Method,
        normalize: Callable[[Tensor], Tensor] | None,
        device: str | torch.device = "auto",
        *,
        precision: str = "fp32",
        channels_last: bool = True,
    ) -> None:
        self.device = select_device(device)
        self.precision = select_precision(precision, self.device)
        self._normalize = normalize
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.method: Method = method.to(device=self.device, memory_format=self._memory_format).eval()  # type: ignore[call-overload]

    def inputs(self, images: Tensor) -> Tensor:
        """Return the method's input, float32 (B, 3, S, S), normalised, on ``device``."""
        moved = images.to(self.device, non_blocking=True)
        normalized = moved if self._normalize is None else self._normalize(moved)
        return normalized.to(memory_format=self._memory_format)

    @torch.inference_mode()
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> logits (B, K) in float32; ``Method.combine_heads`` turns them into the prediction."""
        with within_memory(len(images)):
            return self.method.head_logits(self.inputs(images))

    def heads_and_similarities(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return ``head_logits``, and similarities if the network has class means, in one pass."""
        means = self.method.class_means
        if means is None:
            return self.head_logits(images), None
        heads, features = self.heads_and_features(images)
        return heads, similarity(features, means)

    @torch.inference_mode()
    def heads_and_features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return ``Method.heads_and_features``, in float32."""
        with within_memory(len(images)):
            return self.method.heads_and_features(self.inputs(images))

    def logits(self, images: Tensor) -> Tensor:
        """Return logits, see ``Network``."""
        return self._compute(lambda inputs: (self.method(inputs),), images)[0]

    @property
    def has_similarities(self) -> bool:
        """See ``Network``."""
        return self.method.class_means is not None

    def logits_and_similarities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and similarities, see ``Network``."""
        logits, features = self.logits_and_features(images)
        assert self.method.class_means is not None
        return logits, similarity(features, self.method.class_means)

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Method.logits_and_features``, float32 on ``device``."""
        logits, features = self._compute(self.method.logits_and_features, images)
        return logits, features

    def embeddings(self, images: Tensor) -> Tensor:
        """Return embeddings, see ``Network``."""
        return self._compute(lambda inputs: (self.method.embeddings(inputs),), images)[0]

    def maps(
        self, images: Tensor, kind: Kind, classes: int | None, probabilities: Tensor
    ) -> list[Explanation]:
        """Return maps in float32, see ``Network``."""
        with within_memory(len(images)):
            return explain_images(
                self.method, self.inputs(images), maps=kind, classes=classes, probabilities=probabilities
            )

    @torch.inference_mode()
    def _compute(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor
    ) -> tuple[Tensor, ...]:
        reduced = self.precision != torch.float32
        with within_memory(len(images)):
            inputs = self.inputs(images)
            with torch.autocast(self.device.type, self.precision, enabled=reduced):
                outputs = tuple(output.float() for output in function(inputs))
            if reduced and not all(output.isfinite().all() for output in outputs):
                outputs = function(inputs)
        return outputs


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a precision; see ``TorchNetwork``.

    Raises:
        UsageError: For an unknown name.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if fast else torch.float32
    if name not in DTYPES:
        raise unknown("precision", name, ("auto", *DTYPES))
    return DTYPES[name]


@contextmanager
def within_memory(count: int) -> Iterator[None]:
    """Turn running out of GPU memory at ``count`` images per step into a ``CrossXError`` with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CrossXError(
            f"out of GPU memory at {count} images per step: lower the batch size (--data.batch_size), or use the CPU "
            "(--device cpu)."
        ) from error


def check_finite(logits: Tensor, similarities: Tensor | None = None) -> None:
    """Raise ``CrossXError`` if any of the logits (N, K) or similarities (N,) is not finite."""
    finite = logits.isfinite().all(dim=1)
    if similarities is not None:
        finite &= similarities.isfinite()
    broken = int((~finite).sum())
    if broken:
        raise CrossXError(
            f"the network's output is not finite on {broken} of {len(logits)} images: its weights are damaged, or "
            "training diverged."
        )


def require_finite(outputs: Tensor) -> Tensor:
    """Return outputs of a trained network; raises ``CrossXError`` if a number is not finite."""
    if not outputs.isfinite().all():
        raise CrossXError("the network's output is not finite: its weights are damaged.")
    return outputs
