"""From image files to class names with a trained run."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossx.data.images import ImageError, find_images, read_image
from crossx.data.transforms import Normalize, batch_images, eval_transform
from crossx.deploy.exported import ExportedModel, is_exported
from crossx.errors import CrossXError, UsageError, nearest
from crossx.evaluation.device import select_device
from crossx.evaluation.tables import write_table
from crossx.explain.maps import Explanation, Kind, explain_images
from crossx.methods.base import Method
from crossx.methods.checkpoint import load_method
from crossx.runs import ModelSpec

OneImage: TypeAlias = Path | bytes | Image.Image | Tensor
"""An image file, the bytes of one, an opened image, or a uint8 RGB tensor (3, H, W)."""
ImageInput: TypeAlias = str | OneImage
"""One image, or a folder of image files."""

TABLE_COLUMNS = ("path", "label", "probability", "error", "rank")
"""Columns of a table of predictions; ``rank`` only where more than one class an image was asked for."""
MAX_WORKERS = 8
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclass(frozen=True)
class Prediction:
    """What the network says about one image.

    Attributes:
        path: The image file; None for an image that was given in memory.
        label: Name of the most probable class; None where the image could not be read.
        probability: Its calibrated probability, softmax(logits / temperature); None likewise.
        error: Why there is no prediction, on one line; None where there is one.
        top: The most probable classes and their probabilities, best first, as many as were asked for.
    """

    path: Path | None
    label: str | None = None
    probability: float | None = None
    error: str | None = None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ExplainedImage:
    """Where the network looks in one image.

    Attributes:
        path: The image file; None for an image that was given in memory.
        pixels: uint8 (S, S, 3), what the network saw of it; None where the image could not be read.
        explanation: Prediction and maps; None likewise.
        error: Why there is none, on one line; None where there is one.
    """

    path: Path | None
    pixels: NDArray[np.uint8] | None = None
    explanation: Explanation | None = None
    error: str | None = None


class Predictor:
    """A trained network with its class names and preprocessing.

    Args:
        method: The trained network; it is moved to ``device`` and put into evaluation mode.
        spec: The description that belongs to it.
        device: See ``select_device``.

    Attributes:
        spec: What ``model.json`` of the run says.
        device: Where the network is.
    """

    def __init__(self, method: Method, spec: ModelSpec, device: str | torch.device = "auto") -> None:
        self.device = select_device(device)
        self._method: Method = method.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.spec = spec
        self._transform = eval_transform(spec.preprocessing)
        self._normalize = Normalize(spec.preprocessing)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "auto") -> Predictor:
        """Load a run folder (its selected weights), a checkpoint file in one, or a file of ``crossx export``.

        Raises:
            UsageError: If there is no such device, or an exported file is to run on another than the CPU.
            CrossXError: If there is no such run, or it has no weights that fit.
        """
        if is_exported(path):
            return ExportedPredictor(path, device)
        chosen = select_device(device)
        method, spec = load_method(path)
        return cls(method, spec, chosen)

    @property
    def method(self) -> Method:
        """The network: images (B, 3, H, W), normalised, to logits (B, K).

        Raises:
            CrossXError: If this is an exported file, which gives nothing but predictions.
        """
        return self._method

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in label order."""
        return self.spec.classes

    def predict(
        self, images: ImageInput | Iterable[ImageInput], top: int = 1, batch_size: int = 16
    ) -> list[Prediction]:
        """Classify images.

        An image that cannot be read gives a prediction with ``error`` set, and the rest goes on.

        Args:
            images: Image files, folders (every image below them, sorted), the bytes of image files, opened Pillow
                images or uint8 RGB tensors (3, H, W); or just one of these.
            top: How many classes to give for each image.
            batch_size: Images a step.

        Returns:
            A prediction for each image, in order.

        Raises:
            CrossXError: If a path does not exist, or a folder holds no image.
        """
        return list(self.iter_predict(images, top, batch_size))

    def iter_predict(
        self, images: ImageInput | Iterable[ImageInput], top: int = 1, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Classify images as ``predict`` does, giving each prediction as soon as its batch is done.

        Images are decoded in threads ahead of the network, and only a few batches are held in memory.
        """
        if top < 1 or batch_size < 1:
            raise UsageError(f"top and batch_size must be at least 1, not {top} and {batch_size}.")
        return self.iter_images(_expand(_listed(images)), top, batch_size)

    def iter_images(
        self, images: Iterable[OneImage], top: int = 1, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Classify images one for one, as ``iter_predict`` does, but take each path as a file, there or not.

        The images are taken from ``images`` only a few batches ahead.
        """
        for items, prepared in self._batches(images, batch_size):
            answers = iter(self.classify([image for image in prepared if isinstance(image, Tensor)], top))
            for item, image in zip(items, prepared, strict=True):
                path = item if isinstance(item, Path) else None
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                else:
                    best = next(answers)
                    yield Prediction(path, *best[0], top=best)

    def iter_explain(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        maps: Kind = "activation",
        target: str | None = None,
        batch_size: int = 16,
    ) -> Iterator[ExplainedImage]:
        """Compute where the network looks in images, giving each result as soon as its batch is done.

        An image that cannot be read gives a result with ``error`` set, and the rest goes on.

        Args:
            images: See ``predict``.
            maps: ``activation``, ``class`` or ``both``, see ``crossx.explain.explain_images``.
            target: Name of the class that class maps explain; by default each image's predicted one.
            batch_size: Images a step.

        Raises:
            UsageError: For an unknown class or ``maps``, or class maps that the network does not have.
            CrossXError: If a path does not exist, a folder holds no image, or the network's maps are not finite.
        """
        number = None if target is None else class_number(target, self.classes)
        for items, prepared in self._batches(_expand(_listed(images)), batch_size):
            readable = [image for image in prepared if isinstance(image, Tensor)]
            explanations: Iterator[Explanation] = iter(())
            if readable:
                with _within_memory(len(readable)):
                    inputs = self._normalize(batch_images(readable).to(self.device))
                    explanations = iter(
                        explain_images(
                            self.method,
                            inputs,
                            maps=maps,
                            classes=number,
                            temperature=self.spec.temperature,
                        )
                    )
            for item, image in zip(items, prepared, strict=True):
                path = item if isinstance(item, Path) else None
                if isinstance(image, str):
                    yield ExplainedImage(path, error=image)
                else:
                    yield ExplainedImage(path, image.permute(1, 2, 0).numpy(), next(explanations))

    def inputs(self, images: ImageInput | Iterable[ImageInput]) -> Tensor:
        """Return images as the network takes them, float32 (B, 3, S, S), normalised, on ``device``.

        Raises:
            CrossXError: If an image cannot be read, or there is none.
        """
        items = _expand(_listed(images))
        prepared = [self._try(item) for item in items]
        for item, image in zip(items, prepared, strict=True):
            if isinstance(image, str):
                raise CrossXError(f"{item if isinstance(item, Path) else 'an image'}: {image.rstrip('.')}.")
        if not prepared:
            raise CrossXError("there are no images.")
        return self._normalize(batch_images([i for i in prepared if isinstance(i, Tensor)]).to(self.device))

    def _batches(
        self, images: Iterable[OneImage], batch_size: int
    ) -> Iterator[tuple[list[OneImage], list[Tensor | str]]]:
        """Give batches of images and what ``_try`` makes of them, in threads a few batches ahead."""
        workers = min(MAX_WORKERS, os.cpu_count() or 1)
        waiting: deque[tuple[OneImage, Future[Tensor | str]]] = deque()
        todo = iter(images)
        pool = ThreadPoolExecutor(workers)
        try:
            while True:
                ahead = batch_size + max(batch_size, workers) - len(waiting)
                waiting.extend((item, pool.submit(self._try, item)) for item in islice(todo, ahead))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                yield [item for item, _ in batch], [prepared.result() for _, prepared in batch]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def prepare(self, item: OneImage) -> Tensor:
        """Decode one image and prepare it as the run does in evaluation. Threads may call it side by side.

        Returns:
            uint8 (3, S, S), on the CPU.

        Raises:
            ImageError: If the file or its bytes cannot be read; ``reason`` says why without the path.
            CrossXError: If it is no image that can be prepared.
        """
        decoded = self._transform.read(item) if isinstance(item, Path | bytes) else _pixels(item)
        return self._transform(decoded)

    @torch.inference_mode()
    def classify(
        self, images: Sequence[Tensor] | Tensor, top: int = 1
    ) -> list[tuple[tuple[str, float], ...]]:
        """Classify what ``prepare`` gave, as one batch.

        Args:
            images: uint8 tensors (3, S, S), or one tensor (B, 3, S, S).
            top: How many classes to give for each image; all of them where there are fewer.

        Returns:
            For each image its most probable classes with their probabilities, best first: the softmax of
            logits / T, T being the run's temperature.

        Raises:
            CrossXError: If the logits are not finite or the GPU's memory is too small.
        """
        if len(images) == 0:
            return []
        batch = images if isinstance(images, Tensor) else batch_images(images)
        with _within_memory(len(batch)):
            logits = self._logits(batch)
        if not logits.isfinite().all():
            raise CrossXError("the network's output is not finite: its weights are damaged.")
        values, indices = (logits / self.spec.temperature).softmax(dim=1).topk(min(top, len(self.classes)))
        return [
            tuple((self.classes[i], value) for i, value in zip(labels, row, strict=True))
            for labels, row in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def _logits(self, images: Tensor) -> Tensor:
        """Return float32 logits (B, K) of uint8 images (B, 3, S, S)."""
        logits: Tensor = self.method(self._normalize(images.to(self.device)))
        return logits.float()

    def _try(self, item: OneImage) -> Tensor | str:
        """Return the prepared image, or why there is none."""
        try:
            return self.prepare(item)
        except ImageError as error:
            return error.reason
        except CrossXError as error:
            return str(error)


class ExportedPredictor(Predictor):
    """A file of ``crossx export`` in a network's place. It predicts on the CPU, and explains nothing.

    Args:
        path: The file.
        device: ``auto`` or ``cpu``.

    Raises:
        UsageError: If it is another device.
        CrossXError: If the file cannot be used, see ``ExportedModel.load``.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "auto") -> None:
        if str(device) not in ("auto", "cpu"):
            raise UsageError(f"{path}: an exported file is run on the CPU here, not on {str(device)!r}.")
        self._model = ExportedModel.load(path)
        self._path = path
        self.device = torch.device("cpu")
        self.spec = self._model.spec
        self._transform = eval_transform(self.spec.preprocessing)
        self._normalize = Normalize(self.spec.preprocessing)

    @property
    def method(self) -> Method:
        """Always raises, see ``Predictor.method``."""
        raise CrossXError(f"{self._path}: an exported file gives predictions alone: give the run instead.")

    def _logits(self, images: Tensor) -> Tensor:
        return self._model.logits(images)


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Return image files: files as they are given, in place of a folder every image below it, sorted.

    Raises:
        CrossXError: If a path does not exist, or a folder holds no image.
    """
    return [file for path in paths for file in _files(Path(path))]


def write_csv(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write predictions as CSV, atomically.

    Args:
        path: The file: columns ``path, label, probability, error``; with ``top`` above 1 one row a rank with
            the further column ``rank``, 1 for the best, empty where there is an error.
        predictions: What ``predict`` or ``iter_predict`` gave with the same ``top``.
        top: How many classes an image.

    Raises:
        CrossXError: If the file cannot be written.
    """
    rows = (row for prediction in predictions for row in table_rows(prediction.path, prediction, top))
    if top == 1:
        write_table(path, TABLE_COLUMNS[:4], (row[:4] for row in rows))
    else:
        write_table(path, TABLE_COLUMNS, rows)


def table_rows(
    name: object, prediction: Prediction, top: int
) -> Iterator[tuple[object, str | None, float | None, str | None, int | None]]:
    """Give the rows of a table with ``TABLE_COLUMNS``: one a rank, or one with the error."""
    if prediction.error is not None:
        yield name, None, None, prediction.error, None
    for rank, (label, probability) in enumerate(prediction.top[:top], start=1):
        yield name, label, probability, None, rank


def class_number(name: str, classes: Sequence[str]) -> int:
    """Return the label of the class called ``name``.

    Raises:
        UsageError: If there is none; the nearest name is suggested.
    """
    if name not in classes:
        raise UsageError(
            f"unknown class {name!r}.{nearest(name, classes)} model.json of the run lists its {len(classes)} classes."
        )
    return classes.index(name)


@contextmanager
def _within_memory(count: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CrossXError(
            f"out of GPU memory at {count} images a step: lower the batch size, or use the CPU."
        ) from error


def _listed(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    return [images] if isinstance(images, str | bytes | Path | Image.Image | Tensor) else images


def _expand(images: Iterable[ImageInput]) -> list[OneImage]:
    items: list[OneImage] = []
    for image in images:
        if isinstance(image, str | Path):
            items.extend(_files(Path(image)))
        else:
            items.append(image)
    return items


def _files(path: Path) -> list[Path]:
    # os.path and not Path: it is also false for a name too long or a folder that may not be entered
    if not os.path.exists(path):
        raise CrossXError(f"{path}: no such file or folder.")
    if not path.is_dir():
        return [path]
    files = find_images(path)
    if not files:
        raise CrossXError(f"{path}: there is no image in this folder or below it.")
    return files


def _pixels(item: Image.Image | Tensor) -> Tensor:
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8 or item.dim() != 3 or item.shape[0] != 3 or item.numel() == 0:
            raise CrossXError(
                f"an image tensor must be uint8 RGB of shape (3, H, W), not {item.dtype} {tuple(item.shape)}."
            )
        return item
    # Through a file's bytes, so that rotation, transparency and modes are treated in one place.
    buffer = io.BytesIO()
    try:
        picture = item if item.mode in _PNG_MODES else item.convert("RGB")
        picture.save(buffer, "PNG", compress_level=0, exif=item.getexif())
    except Exception as error:  # an image opened from a broken file makes Pillow's plugins raise anything
        raise CrossXError(f"the image cannot be decoded ({error}).") from error
    return read_image(buffer.getvalue())
