"""Example images of a test set, and the activation maps of the network on them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossx.evaluation.metrics import MutualConfusion, mutual_confusions
from crossx.evaluation.predictions import Answers
from crossx.runs import ModelSpec, atomic_path

if TYPE_CHECKING:
    from crossx.evaluation.network import TorchNetwork

PAIRS = 6
"""Confused pairs of classes with images of both."""
WRONG = 8
"""Wrong predictions shown, the most confident ones."""
RIGHT = 8
"""Correct predictions shown, drawn at random with ``SEED``."""
SEED = 0
BATCH_SIZE = 16


class ShownImages(NamedTuple):
    """Indices of the images of a test set that are shown.

    Attributes:
        pairs: A confused pair, its most confident mistake, and the most confident correct image of the predicted class
            (None if no image of that class is predicted correctly).
        wrong: The most confident wrong predictions, most confident first.
        right: Correct predictions drawn at random, in the order of the images.
    """

    pairs: list[tuple[MutualConfusion, int, int | None]]
    wrong: list[int]
    right: list[int]

    @property
    def images(self) -> list[int]:
        """Every image that is shown, sorted and without duplicates."""
        shown = {image for _, *both in self.pairs for image in both if image is not None}
        return sorted(shown.union(self.wrong, self.right))


@dataclass(frozen=True)
class ExampleMaps:
    """What a network's parts look at in some images of a test set, for pages that are made without the network.

    Attributes:
        maps: Stage name -> float32 (n, P, h, w), see ``Method.activation_maps``.
        boxes: float32 (n, m, 4), see ``Method.boxes``; None for methods without.
    """

    maps: Mapping[str, NDArray[np.float32]]
    boxes: NDArray[np.float32] | None = None

    def save(self, path: Path, numbers: Sequence[int], answers: Answers) -> None:
        """Write an ``.npz`` file atomically.

        Args:
            path: The file, see ``maps_path``.
            numbers: The images, counted within the split.
            answers: The network's answers to the whole split, by which ``load`` recognises it.

        Raises:
            CrossXError: If it cannot be written.
        """
        boxes = {} if self.boxes is None else {"boxes": self.boxes}
        named = {f"{PREFIX}{stage}": values for stage, values in self.maps.items()}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, key=_key(numbers, answers), **named, **boxes)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path, numbers: Sequence[int], answers: Answers) -> ExampleMaps | None:
        """Read what ``save`` wrote; None if it is missing, damaged, or of other images or answers."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if not np.array_equal(arrays["key"], _key(numbers, answers)):
                    return None
                maps = {name.removeprefix(PREFIX): arrays[name] for name in arrays if name.startswith(PREFIX)}
                boxes = arrays.get("boxes")
        except Exception:  # zipfile, zlib and numpy each raise their own
            return None
        every = [*((values, 4) for values in maps.values()), *([(boxes, 3)] if boxes is not None else [])]
        for values, dimensions in every:
            good = values.dtype.kind == "f" and values.ndim == dimensions and len(values) == len(numbers)
            if not good or values.size == 0 or not np.isfinite(values).all():
                return None
        if not maps or (boxes is not None and boxes.shape[-1] != 4):
            return None
        return cls(maps, boxes)


PREFIX = "map "


def maps_path(output: Path, split: str) -> Path:
    """Return the file of the example maps on ``split`` in the output folder of ``test_run``."""
    return output / split / "examples.npz"


def compute_maps(network: TorchNetwork, spec: ModelSpec, files: Sequence[Path]) -> ExampleMaps:
    """Run a network over images.

    Args:
        network: The network, on its device.
        spec: Its description.
        files: The images, at least one.

    Raises:
        CrossXError: If an image cannot be read or GPU memory runs out.
    """
    import torch

    from crossx.data.transforms import batch_images, eval_transform
    from crossx.evaluation.network import within_memory

    transform = eval_transform(spec.preprocessing)
    found: dict[str, list[Any]] = {}
    for start in range(0, len(files), BATCH_SIZE):
        batch = batch_images([transform(transform.read(file)) for file in files[start : start + BATCH_SIZE]])
        with torch.inference_mode(), within_memory(len(batch)):
            inputs = network.inputs(batch)
            computed = {
                f"{PREFIX}{stage}": values for stage, values in network.method.activation_maps(inputs).items()
            }
            if (boxes := network.method.boxes(inputs)) is not None:
                computed["boxes"] = boxes
        for name, values in computed.items():
            found.setdefault(name, []).append(values.float().cpu().numpy())
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    boxes_of_all = joined.pop("boxes", None)
    return ExampleMaps({name.removeprefix(PREFIX): values for name, values in joined.items()}, boxes_of_all)


def choose_examples(run: Answers) -> ShownImages:
    """Choose at most ``2 * PAIRS + WRONG + RIGHT`` images to show, the same on every machine."""
    wrong = np.flatnonzero(~run.correct)
    right = np.flatnonzero(run.correct)
    drawn = np.random.default_rng(SEED).choice(right, min(RIGHT, len(right)), replace=False)
    pairs = []
    for pair in mutual_confusions(run.confusion)[:PAIRS]:
        mistakes = (run.targets == pair.target) & (run.predictions == pair.prediction)
        mistake = _most_confident(run, mistakes)
        assert mistake is not None
        pairs.append((pair, mistake, _most_confident(run, run.correct & (run.targets == pair.prediction))))
    return ShownImages(
        pairs,
        wrong[np.argsort(-run.confidences[wrong], kind="stable")][:WRONG].tolist(),
        sorted(drawn.tolist()),
    )


def _key(numbers: Sequence[int], answers: Answers) -> NDArray[np.int64]:
    checksum = zlib.crc32(np.ascontiguousarray(answers.logits, dtype=np.float32).tobytes())
    return np.array([checksum, *numbers], dtype=np.int64)


def _most_confident(run: Answers, chosen: NDArray[np.bool_]) -> int | None:
    """Return the most confident image of a mask, the first of equal ones."""
    images = np.flatnonzero(chosen)
    return int(images[run.confidences[images].argmax()]) if len(images) else None
