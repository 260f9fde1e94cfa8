"""From images to class names and features with a trained run: the one place that computes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.v2 import functional as vision

from crossx.data.images import ImageError
from crossx.data.transforms import Normalize, batch_images, eval_transform, resized_side, square_transform
from crossx.deploy.exported import ExportedModel, is_exported
from crossx.deploy.inputs import ImageInput, OneImage, decode, expand
from crossx.errors import CrossXError, UsageError, nearest, unknown
from crossx.evaluation.device import select_device
from crossx.explain.maps import Explanation, Kind, explain_images
from crossx.methods.base import Method
from crossx.methods.checkpoint import load_method
from crossx.runs import PREDICTS_ALONE, ModelSpec, Preprocessing, Run, open_run

MAX_WORKERS = 8
PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CROPS = (1, 5)

T = TypeVar("T")


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


@dataclass(frozen=True)
class Features:
    """What the network's classifiers see of one image.

    Attributes:
        path: The image file; None for an image that was given in memory.
        vector: float32 (D,), of length 1; None where the image could not be read.
        error: Why there is none, on one line; None where there is one.
    """

    path: Path | None
    vector: NDArray[np.float32] | None = None
    error: str | None = None


class Predictor:
    """A trained network with its class names and preprocessing: files, bytes, Pillow images or arrays to predictions.

    With ``flip`` or ``crops`` the network sees several views of each image. The probabilities of the views are
    averaged, as by Krizhevsky et al. (2012, section 4.1), and not the logits: a probability is what the temperature
    has calibrated, and a view that sees nothing, whose classes are all about as probable, then weighs little.

    Args:
        method: The trained network; it is moved to ``device`` and put into evaluation mode.
        spec: The description that belongs to it.
        device: See ``select_device``.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto``: fp16 on a GPU that is fast in it (compute capability 7
            or above), else fp32. fp16 has eight times the resolution of bf16; where its range is left, the batch is
            computed again in fp32. The parameters stay float32 (``torch.autocast``).
        flip: Whether the mirror image of each view is a view too.
        crops: 1, the centre, or 5, the four corners of the resized image's central square and its centre.

    Attributes:
        spec: What ``model.json`` of the run says.
        device: Where the network is.
        origin: The run and the file of weights that it was loaded from; None for a network made otherwise.
        explains: Whether the network is there, and not its predictions alone: ``iter_explain`` and the like work.

    Raises:
        UsageError: For an unknown device or precision, or crops that cannot be.
    """

    origin: tuple[Run, Path] | None = None
    explains = True

    def __init__(
        self,
        method: Method,
        spec: ModelSpec,
        device: str | torch.device = "auto",
        *,
        precision: str = "auto",
        flip: bool = False,
        crops: int = 1,
    ) -> None:
        self.device = select_device(device)
        self.precision = _select_precision(precision, self.device)
        self._method: Method = method.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._set_preparation(spec, flip, crops)

    def _set_preparation(self, spec: ModelSpec, flip: bool, crops: int) -> None:
        self.flip = flip
        self.crops = crops
        self.spec = spec
        self._transform = eval_transform(spec.preprocessing)
        if crops != 1:
            self._transform = square_transform(_checked_crops(crops, spec.preprocessing))
        self._normalize = Normalize(spec.preprocessing)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "auto", *, trust: bool = False, **options: Any
    ) -> Predictor:
        """Load a run (its selected weights), a checkpoint in one, a model on the Hub, or a file of ``crossx export``.

        Args:
            path: See ``crossx.runs.open_run``: ``"runs/mine"``, ``"user/name"``, ``"user/name@revision"``; or the
                exported file.
            device: See ``select_device``.
            trust: Whether a ``.pt2`` file may be loaded, which can run any code: only for files that you made.
            **options: ``precision``, ``flip`` and ``crops``, as the class takes them.

        Raises:
            UsageError: If there is no such device, or an option cannot be; an exported file takes no other device
                than the CPU, and no precision than its own; a ``.pt2`` file is not loaded without ``trust``.
            CrossXError: If there is no such run or model, or it has no weights that fit.
        """
        if is_exported(path):
            return ExportedPredictor(path, device, trust=trust, **options)
        chosen = select_device(device)
        origin = open_run(path)
        method, spec = load_method(origin[1])
        predictor = cls(method, spec, chosen, **options)
        predictor.origin = origin
        return predictor

    def save_pretrained(
        self, folder: str | Path, *, license: str | None = None, images: Iterable[ImageInput] = ()
    ) -> Path:
        """Write the network into a folder to share: safetensors, JSON, a model card and figures.

        ``crossx.load(folder)`` gives the same network again. The card gives the results of ``crossx test`` where
        the network was loaded from a run that has them.

        Args:
            folder: A new or empty folder, or one that was written so before, whose files are written anew.
            license: The Hub's identifier of the licence of the weights (``apache-2.0``); None leaves it open.
            images: Images to show activation maps of in the card. They are published: they must be yours to give.

        Returns:
            The folder.

        Raises:
            UsageError: If the folder holds something else, or ``license`` cannot be an identifier.
            CrossXError: If an image cannot be read, or the folder cannot be written to.
        """
        from crossx.deploy.sharing import save_pretrained

        return save_pretrained(self, folder, license=license, images=images)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        images: Iterable[ImageInput] = (),
    ) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face Hub.

        Args:
            name: ``user/name``; made where it is not there yet.
            private: Whether a new repository is visible to its owner alone.
            token: An access token; by default the one of ``hf auth login`` or ``HF_TOKEN``.
            revision: Branch to upload to, made where it is not there yet; the main one by default.
            license: See ``save_pretrained``.
            images: See ``save_pretrained``.

        Returns:
            The address of the repository.

        Raises:
            UsageError: If ``name`` is no name of a repository, or ``license`` cannot be an identifier.
            CrossXError: If an image cannot be read, or the Hub cannot be reached or refuses.
        """
        from crossx.deploy.sharing import push_to_hub

        return push_to_hub(
            self, name, private=private, token=token, revision=revision, license=license, images=images
        )

    @property
    def method(self) -> Method:
        """The network: images (B, 3, H, W), normalised, to logits (B, K).

        Raises:
            UsageError: If this is an exported file, which gives nothing but predictions.
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
        return self.iter_images(expand(images), top, batch_size)

    def iter_images(
        self, images: Iterable[OneImage], top: int = 1, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Classify images one for one, as ``iter_predict`` does, but take each path as a file, there or not.

        The images are taken from ``images`` only a few batches ahead.
        """
        for item, answer in self._stream(images, batch_size, lambda batch: self.classify(batch, top)):
            path = item if isinstance(item, Path) else None
            if isinstance(answer, str):
                yield Prediction(path, error=answer)
            else:
                yield Prediction(path, *answer[0], top=answer)

    def iter_features(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = 16
    ) -> Iterator[Features]:
        """Compute the features of images, see ``features``, giving each as soon as its batch is done.

        Arguments, errors and images that cannot be read: as in ``iter_predict``.
        """
        for item, answer in self._stream(expand(images), batch_size, self.features):
            path = item if isinstance(item, Path) else None
            if isinstance(answer, str):
                yield Features(path, error=answer)
            else:
                yield Features(path, answer.numpy())

    def iter_explain(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        maps: Kind = "activation",
        target: str | None = None,
        batch_size: int = 16,
    ) -> Iterator[ExplainedImage]:
        """Compute where the network looks in images, giving each result as soon as its batch is done.

        The maps are of the centre crop, in float32; the probabilities, and with them the predicted class, are those
        of ``predict``. An image that cannot be read gives a result with ``error`` set, and the rest goes on.

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

        def explain(batch: Sequence[Tensor]) -> Iterable[tuple[Tensor, Explanation]]:
            images = batch_images(batch)
            centres = self._centres(images)
            with _within_memory(len(batch)):
                explanations = explain_images(
                    self.method,
                    self._normalize(centres.to(self.device)),
                    maps=maps,
                    classes=number,
                    probabilities=self._probabilities(images),
                )
            return zip(centres, explanations, strict=True)

        for item, answer in self._stream(expand(images), batch_size, explain):
            path = item if isinstance(item, Path) else None
            if isinstance(answer, str):
                yield ExplainedImage(path, error=answer)
            else:
                yield ExplainedImage(path, answer[0].permute(1, 2, 0).numpy(), answer[1])

    def inputs(self, images: ImageInput | Iterable[ImageInput]) -> Tensor:
        """Return images as the network takes them, float32 (B, 3, S, S), normalised, on ``device``.

        Raises:
            CrossXError: If an image cannot be read, or there is none.
        """
        items = expand(images)
        prepared = [self._try(item) for item in items]
        for item, image in zip(items, prepared, strict=True):
            if isinstance(image, str):
                raise CrossXError(f"{item if isinstance(item, Path) else 'an image'}: {image.rstrip('.')}.")
        if not prepared:
            raise CrossXError("there are no images.")
        batch = batch_images([image for image in prepared if isinstance(image, Tensor)])
        return self._normalize(self._centres(batch).to(self.device))

    def _stream(
        self,
        images: Iterable[OneImage],
        batch_size: int,
        compute: Callable[[Sequence[Tensor]], Iterable[T]],
    ) -> Iterator[tuple[OneImage, T | str]]:
        """Give each image with what ``compute`` makes of it in its batch, or why it cannot be read."""
        for items, prepared in self._batches(images, batch_size):
            readable = [image for image in prepared if isinstance(image, Tensor)]
            answers = iter(compute(readable)) if readable else iter(())
            for item, image in zip(items, prepared, strict=True):
                yield item, image if isinstance(image, str) else next(answers)

    def _batches(
        self, images: Iterable[OneImage], batch_size: int
    ) -> Iterator[tuple[list[OneImage], list[Tensor | str]]]:
        """Give batches of images and what ``_try`` makes of them, in threads a few batches ahead."""
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
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
            uint8 (3, S, S), on the CPU; with 5 crops (3, R, R), the square of the resized image that they are cut from.

        Raises:
            ImageError: If it cannot be read, or nothing is left of it; ``reason`` says why without the path.
            CrossXError: If it is no image that can be prepared.
        """
        decoded = self._transform.read(item) if isinstance(item, Path | bytes) else decode(item)
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
        values, indices = self._probabilities(images).topk(min(top, len(self.classes)))
        return [
            tuple((self.classes[i], value) for i, value in zip(labels, row, strict=True))
            for labels, row in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def features(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Return what the network's classifiers see (``Method.embeddings``) of what ``prepare`` gave, as one batch.

        Args:
            images: As ``classify`` takes them, at least one.

        Returns:
            float32 (B, D) on the CPU: the mean over the views, scaled to length 1, so that the inner product of two
            images' features is their cosine similarity.

        Raises:
            CrossXError: As ``classify``.
        """
        views = [self._compute(self.method.embeddings, view) for view in self._views(images)]
        return normalize(torch.stack(views).mean(dim=0)).cpu()

    @cached_property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""
        side = self.spec.preprocessing.image_size
        return self._compute(self.method.embeddings, torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[
            1
        ]

    @torch.inference_mode()
    def _probabilities(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the calibrated probabilities (B, K), on ``device``, of what ``prepare`` gave."""
        views = [(self._logits(view) / self.spec.temperature).softmax(dim=1) for view in self._views(images)]
        return torch.stack(views).mean(dim=0)

    def _views(self, images: Sequence[Tensor] | Tensor) -> Iterator[Tensor]:
        """Give the views of a batch of prepared images, each uint8 (B, 3, S, S)."""
        batch = images if isinstance(images, Tensor) else batch_images(images)
        side = self.spec.preprocessing.image_size
        for crop in [batch] if self.crops == 1 else vision.five_crop(batch, [side, side]):
            yield crop
            if self.flip:
                yield crop.flip(-1)

    def _centres(self, images: Tensor) -> Tensor:
        """Return the centre crops (B, 3, S, S) of a batch of prepared images, which they are but for 5 crops."""
        side = self.spec.preprocessing.image_size
        return images if self.crops == 1 else vision.center_crop(images, [side, side])

    @torch.inference_mode()
    def _compute(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return the network's answer, float32 (B, N) on ``device``, to uint8 (B, 3, S, S)."""
        reduced = self.precision != torch.float32
        with _within_memory(len(images)):
            inputs = self._normalize(images.to(self.device))
            with torch.autocast(self.device.type, self.precision, enabled=reduced):
                answer = network(inputs).float()
            finite = bool(answer.isfinite().all())
            if reduced and not finite:
                answer = network(inputs)
                finite = bool(answer.isfinite().all())
        if not finite:
            raise CrossXError("the network's output is not finite: its weights are damaged.")
        return answer

    def _logits(self, images: Tensor) -> Tensor:
        """Return finite float32 logits (B, K) of uint8 images (B, 3, S, S)."""
        return self._compute(self.method, images)

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
        precision: ``auto``: the file has its own.
        flip: See ``Predictor``.
        crops: See ``Predictor``.
        trust: See ``ExportedModel.load``.

    Raises:
        UsageError: For another device or precision, crops that cannot be, or a ``.pt2`` file without ``trust``.
        CrossXError: If the file cannot be used, see ``ExportedModel.load``.
    """

    explains = False

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "auto",
        *,
        precision: str = "auto",
        flip: bool = False,
        crops: int = 1,
        trust: bool = False,
    ) -> None:
        if str(device) not in ("auto", "cpu"):
            raise UsageError(f"{path}: an exported file is run on the CPU here, not on {str(device)!r}.")
        if precision != "auto":
            raise UsageError(
                f"{path}: an exported file has the precision that `crossx export --precision` gave it: leave out "
                f"precision {precision!r}."
            )
        self._model = ExportedModel.load(path, trust=trust)
        self._path = path
        self.device = torch.device("cpu")
        self.precision = torch.float32
        self._set_preparation(self._model.spec, flip, crops)

    @property
    def method(self) -> Method:
        """Always raises, see ``Predictor.method``."""
        raise UsageError(f"{self._path}: {PREDICTS_ALONE}")

    def _logits(self, images: Tensor) -> Tensor:
        logits = self._model.logits(images)
        if not logits.isfinite().all():
            raise CrossXError(f"{self._path}: the output is not finite: the file is damaged.")
        return logits


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


def _select_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if fast else torch.float32
    if name not in PRECISIONS:
        raise unknown("precision", name, ("auto", *PRECISIONS))
    return PRECISIONS[name]


def _checked_crops(crops: int, preprocessing: Preprocessing) -> Preprocessing:
    if crops not in CROPS:
        raise UsageError(f"crops must be 1 or 5, not {crops}.")
    if resized_side(preprocessing) <= preprocessing.image_size:
        raise UsageError(
            f"crops: the run resizes images to the {preprocessing.image_size} pixels that it crops, so that 5 crops "
            "would be one. Leave it at 1."
        )
    return preprocessing


@contextmanager
def _within_memory(count: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CrossXError(
            f"out of GPU memory at {count} images a step: lower the batch size, or use the CPU."
        ) from error
