"""Predict classes, features and maps of images with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crossx.data.images import ImageError
from crossx.data.names import class_name
from crossx.data.transforms import Normalize, batch_images
from crossx.errors import CrossXError, UsageError, check_count, check_flag
from crossx.evaluation.decisions import Accept, Decider, Decision
from crossx.evaluation.device import select_device
from crossx.evaluation.network import Network, TorchNetwork, require_finite
from crossx.evaluation.unknowns import ViewScores
from crossx.evaluation.views import Views
from crossx.explain.maps import Explanation, Kind
from crossx.methods.base import Method
from crossx.methods.weights import load_method
from crossx.predict.checksums import exported_files
from crossx.predict.exported import ExportedModel, is_exported
from crossx.predict.identity import WeightsFile
from crossx.predict.inputs import ImageInput, OneImage, decode, expand
from crossx.predict.outputs import Columns
from crossx.predict.prefetch import prefetch_batches
from crossx.predict.results import ExplainedImage, Features, Neighbors, Prediction
from crossx.runs import ModelSpec, Run, open_run
from crossx.suggestions import nearest

T = TypeVar("T")


class PredictorOptions(TypedDict, total=False):
    """How a ``Predictor`` makes its predictions.

    Attributes:
        flip: Whether to add the mirror image of each view; by default not.
        crops: 1, the centre (the default), or 5, the four corners of the resized image's central square and its centre.
        accept: ``known`` (the default): an image below the run's threshold is rejected, it shows none of the classes.
            ``all``: every image gets a class.
        coverage: Coverage of prediction sets, 0.5 to 0.99; by default there are none.
    """

    flip: bool
    crops: int
    accept: Accept
    coverage: float | None


class Answer(NamedTuple):
    """The predicted classes of one prepared image; see ``Prediction``."""

    top: tuple[tuple[str, float], ...]
    rejected: bool = False
    score: float | None = None
    candidates: tuple[str, ...] | None = None


class Predictor:
    """A trained network with its class names and preprocessing.

    With ``flip`` or ``crops`` the network sees several views of each image, whose probabilities are averaged as by
    Krizhevsky et al. (2012, section 4.1). Probabilities rather than logits, since these are calibrated by the
    temperature, and a view without the object, whose classes are nearly equally probable, then has little weight.

    An image whose score is below the run's threshold is rejected: its label is None, see
    ``crossx.evaluation.unknowns``. The threshold is that of the views.

    Args:
        network: The trained network.
        spec: Its description, ``model.json`` of the run.
        origin: The run and the weights file that the network was loaded from, if any.
        **options: See ``PredictorOptions``.

    Attributes:
        weights: The file that ``load`` read the weights from; None for a network of ``from_method``.

    Raises:
        UsageError: If the crops are not possible, or the run has no prediction sets of that coverage.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        *,
        origin: tuple[Run, Path] | None = None,
        **options: Unpack[PredictorOptions],
    ) -> None:
        self.network, self.spec, self.origin = network, spec, origin
        self.weights: WeightsFile | None = None
        self._views = Views(
            spec.preprocessing, flip=options.get("flip", False), crops=options.get("crops", 1)
        )
        self._decider = Decider(
            spec,
            self._views.key,
            has_similarities=network.has_similarities,
            accept=options.get("accept", "known"),
            coverage=options.get("coverage"),
            run=origin[0].path if origin else "the network",
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        *,
        precision: str = "auto",
        trust: bool = False,
        **options: Unpack[PredictorOptions],
    ) -> Predictor:
        """Load a run (its selected weights), a checkpoint, a model on the Hub, or an exported file.

        Args:
            path: See ``crossx.runs.open_run``: ``"runs/mine"``, ``"user/name"``, ``"user/name@revision"``; or a file
                of ``crossx export``, which runs on the CPU in its own precision.
            device: See ``select_device``.
            precision: See ``TorchNetwork``.
            trust: Whether to load a ``.pt2`` file, which can run any code; only for files that you made.
            **options: See ``PredictorOptions``.

        Raises:
            UsageError: If the device does not exist, an option is not possible, or ``path`` is a ``.pt2`` file and
                ``trust`` is False.
            CrossXError: If there is no such run or model, or its weights do not fit.
        """
        check_flag("trust", trust)
        if is_exported(path):
            file = exported_files(Path(path))[-1]
            weights = WeightsFile(file) if file.is_file() else None
            model = ExportedModel.load(path, device, precision, trust=trust)
            predictor = cls(model, model.spec, **options)
            predictor.weights = weights
            return predictor
        # before the weights are read
        chosen = select_device(device)
        origin = open_run(path)
        weights = WeightsFile(origin[1])
        method, spec = load_method(origin[1])
        predictor = cls.from_method(method, spec, chosen, precision=precision, origin=origin, **options)
        predictor.weights = weights
        return predictor

    @classmethod
    def from_method(
        cls,
        method: Method,
        spec: ModelSpec,
        device: str | torch.device = "auto",
        *,
        precision: str = "auto",
        origin: tuple[Run, Path] | None = None,
        **options: Unpack[PredictorOptions],
    ) -> Predictor:
        """Make a predictor of a trained method, which is moved to ``device`` and put into evaluation mode.

        Arguments and errors: as in ``load`` and the class.
        """
        network = TorchNetwork(method, Normalize(spec.preprocessing), device, precision=precision)
        return cls(network, spec, origin=origin, **options)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.device

    @property
    def precision(self) -> torch.dtype:
        """Data type of the network's computations."""
        return self.network.precision

    @property
    def views(self) -> tuple[int, bool]:
        """Number of crops that are averaged over, and whether their mirror images are, too."""
        return self._views.crops, self._views.flip

    @property
    def rejection(self) -> tuple[str, float] | None:
        """Name of the score and its threshold, below which an image is rejected; None if no image is."""
        threshold = self._decider.threshold
        return None if threshold is None else (threshold.score, threshold.least)

    @property
    def coverage(self) -> float | None:
        """Coverage of the prediction sets; None if there are none."""
        return self._decider.coverage

    @property
    def explains(self) -> bool:
        """Whether ``iter_explain``, features and ``method`` work; an exported file only predicts."""
        return self.network.explains

    @property
    def method(self) -> Method:
        """The method: normalised images (B, 3, H, W) to logits (B, K); ``UsageError`` for an exported file."""
        return self.network.method

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in label order."""
        return self.spec.classes

    def columns(self, top: int = 1) -> Columns:
        """Return the columns of a table of predictions with ``top`` classes per image."""
        return Columns(top, nearest=self.rejection is not None, candidates=self.coverage is not None)

    def predict(
        self, images: ImageInput | Iterable[ImageInput], top: int = 1, batch_size: int = 16
    ) -> list[Prediction]:
        """Classify images.

        An image that cannot be read has a prediction with ``error`` set.

        Args:
            images: One or several paths (files, folders, patterns, tables, lists; see ``expand_paths``), bytes of image
                files, Pillow images or uint8 RGB tensors (3, H, W).
            top: Classes per image.
            batch_size: Images per batch.

        Returns:
            One prediction per image, in order.

        Raises:
            UsageError: If something is not of these types.
            CrossXError: As ``expand_paths``.
        """
        return list(self.iter_predict(images, top, batch_size))

    def iter_predict(
        self, images: ImageInput | Iterable[ImageInput], top: int = 1, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Yield the predictions of ``predict`` as soon as their batch is done.

        Images are decoded in threads ahead of the network; only a few batches are held in memory.
        """
        check_count("top", top)
        check_count("batch_size", batch_size)
        return self.iter_images(expand(images), top, batch_size)

    def iter_images(
        self, images: Iterable[OneImage], top: int = 1, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Classify images as ``iter_predict`` does, but without expanding or checking paths.

        ``images`` is consumed only a few batches ahead.
        """
        for path, answer in self._stream(images, batch_size, lambda batch: self.answer(batch, top)):
            if isinstance(answer, str):
                yield Prediction(path, error=answer)
            else:
                label, probability = answer.top[0]
                yield Prediction(
                    path,
                    None if answer.rejected else label,
                    probability,
                    top=answer.top,
                    score=answer.score,
                    candidates=answer.candidates,
                )

    def iter_features(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = 16
    ) -> Iterator[Features]:
        """Yield the features of images, see ``features``; arguments and errors as in ``iter_predict``."""
        return self.iter_image_features(expand(images), batch_size)

    def iter_image_features(self, images: Iterable[OneImage], batch_size: int = 16) -> Iterator[Features]:
        """Yield features as ``iter_features`` does, but without expanding or checking paths; see ``iter_images``."""
        for path, answer in self._stream(images, batch_size, self.features):
            if isinstance(answer, str):
                yield Features(path, error=answer)
            else:
                yield Features(path, answer.numpy())

    def neighbors(
        self,
        images: ImageInput | Iterable[ImageInput],
        top: int = 5,
        *,
        root: str | Path | None = None,
        approximate: bool | None = None,
        batch_size: int = 16,
    ) -> list[Neighbors]:
        """Find the training images that are nearest to images by the cosine of their features.

        The features of the training images are computed once and kept in the run folder; see ``NeighborIndex.open``.

        Args:
            images: See ``predict``.
            top: Neighbours per image.
            root: The training images' folder, if it has moved.
            approximate: See ``make_index``.
            batch_size: Images per batch.

        Returns:
            One result per image, in order; one that cannot be read has ``error`` set.

        Raises:
            UsageError: If the network is not that of a run folder, or a library is missing.
            CrossXError: If the training images are no longer there, or as ``expand_paths``.
        """
        from crossx.predict.neighbors import NeighborIndex

        check_count("top", top)
        check_count("batch_size", batch_size)
        items = expand(images)
        index = NeighborIndex.open(self, root=root, approximate=approximate, batch_size=batch_size)
        return list(index.find(items, top, batch_size))

    def iter_explain(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        maps: Kind = "activation",
        target: str | None = None,
        batch_size: int = 16,
    ) -> Iterator[ExplainedImage]:
        """Yield where the network looks in images, as soon as their batch is done.

        Maps are of the centre crop, in float32; probabilities and predicted class are those of ``predict``. An image
        that cannot be read has a result with ``error`` set.

        Args:
            images: See ``predict``.
            maps: ``activation``, ``class`` or ``both``, see ``crossx.explain.explain_images``.
            target: Name of the class that class maps explain; by default the predicted one.
            batch_size: Images per batch.

        Raises:
            UsageError: For an unknown class or ``maps``, or class maps that the network does not have.
            CrossXError: If a path does not exist, a folder holds no image, or the network's maps are not finite.
        """
        number = None if target is None else class_number(target, self.classes)

        def explain(batch: Sequence[Tensor]) -> Iterable[tuple[Tensor, Explanation, bool]]:
            joined = batch_images(batch)
            centres, decided = self._views.centres(joined), self._decide(joined)
            explanations = self.network.maps(centres, maps, number, decided.probabilities)
            return zip(centres, explanations, decided.rejected.tolist(), strict=True)

        for path, answer in self._stream(expand(images), batch_size, explain):
            if isinstance(answer, str):
                yield ExplainedImage(path, error=answer)
            else:
                # (3, S, S) -> (S, S, 3)
                yield ExplainedImage(path, answer[0].permute(1, 2, 0).numpy(), answer[1], rejected=answer[2])

    def inputs(self, images: ImageInput | Iterable[ImageInput]) -> Tensor:
        """Return the network's input, float32 (B, 3, S, S), normalised, on ``device``.

        Raises:
            CrossXError: If an image cannot be read, or there is none.
        """
        items = expand(images)
        prepared = [self._try_prepare(item) for item in items]
        for item, image in zip(items, prepared, strict=True):
            if isinstance(image, str):
                raise CrossXError(f"{item if isinstance(item, Path) else 'an image'}: {image.rstrip('.')}.")
        if not prepared:
            raise CrossXError("there are no images.")
        batch = batch_images([image for image in prepared if isinstance(image, Tensor)])
        return Normalize(self.spec.preprocessing)(self._views.centres(batch).to(self.device))

    def _stream(
        self,
        images: Iterable[OneImage],
        batch_size: int,
        compute: Callable[[Sequence[Tensor]], Iterable[T]],
    ) -> Iterator[tuple[Path | None, T | str]]:
        """Yield each image's file, if it has one, with its result of ``compute``, or why it cannot be read."""
        for items, prepared in prefetch_batches(images, self._try_prepare, batch_size):
            readable = [image for image in prepared if isinstance(image, Tensor)]
            answers = iter(compute(readable)) if readable else iter(())
            for item, image in zip(items, prepared, strict=True):
                path = item if isinstance(item, Path) else None
                yield path, image if isinstance(image, str) else next(answers)

    def prepare(self, item: OneImage) -> Tensor:
        """Decode one image and prepare it as in evaluation; thread-safe.

        Returns:
            uint8 (3, S, S), on the CPU; with 5 crops (3, R, R), the square of the resized image around all crops.

        Raises:
            ImageError: If it cannot be read or the crop is empty; ``reason`` says why, without the path.
            CrossXError: If it is not a supported image.
        """
        return self._views.transform(self.read(item))

    def read(self, item: OneImage) -> Tensor:
        """Decode one image to uint8 RGB (3, H, W), which other methods take as an image; thread-safe."""
        return self._views.transform.read(item) if isinstance(item, Path | bytes) else decode(item)

    @torch.inference_mode()
    def classify(
        self, images: Sequence[Tensor] | Tensor, top: int = 1
    ) -> list[tuple[tuple[str, float], ...]]:
        """Classify prepared images as one batch.

        Args:
            images: Results of ``prepare``, or one tensor (B, 3, S, S).
            top: Classes per image, at most K.

        Returns:
            For each image its most probable classes with their probabilities, softmax(logits / temperature), best
            first.

        Raises:
            CrossXError: If the logits are not finite or the GPU is out of memory.
        """
        return [answer.top for answer in self.answer(images, top)]

    @torch.inference_mode()
    def answer(
        self, images: Sequence[Tensor] | Tensor, top: int = 1, coverages: Sequence[float | None] | None = None
    ) -> list[Answer]:
        """Classify prepared images as one batch; say which are rejected, and give their prediction sets.

        Args:
            images: As in ``classify``.
            top: Classes per image, at most K.
            coverages: Coverage of the prediction set of each image; by default that of the predictor.

        Raises:
            UsageError: As ``least_probability``.
            CrossXError: As ``classify``.
        """
        if len(images) == 0:
            return []
        coverages = [self.coverage] * len(images) if coverages is None else coverages
        probabilities, rejected, scores = self._decide(images)
        values, indices = probabilities.topk(min(top, len(self.classes)))
        return [
            Answer(
                tuple((self.classes[i], value) for i, value in zip(labels, row, strict=True)),
                reject,
                score,
                None if coverage is None else self._candidates(image, coverage),
            )
            for labels, row, reject, score, coverage, image in zip(
                indices.tolist(),
                values.tolist(),
                rejected.tolist(),
                [None] * len(images) if scores is None else scores.tolist(),
                coverages,
                probabilities,
                strict=True,
            )
        ]

    def least_probability(self, coverage: float) -> float:
        """Return the least probability of a class in a prediction set, see ``Decider.least_probability``."""
        return self._decider.least_probability(coverage)

    def _candidates(self, probabilities: Tensor, coverage: float) -> tuple[str, ...]:
        return tuple(self.classes[label] for label in self._decider.prediction_set(probabilities, coverage))

    @torch.inference_mode()
    def features(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the features (``Method.embeddings``) of prepared images, as one batch.

        Args:
            images: As in ``classify``.

        Returns:
            float32 (B, D) on the CPU: the mean over the views, L2-normalised.

        Raises:
            CrossXError: As ``classify``.
        """
        views = [require_finite(self.network.embeddings(view)) for view in self._views.split(images)]
        return normalize(torch.stack(views).mean(dim=0)).cpu()

    @cached_property
    def feature_size(self) -> int:
        """Length D of a feature vector."""
        side = self.spec.preprocessing.image_size
        return self.network.embeddings(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]

    @torch.inference_mode()
    def _decide(self, images: Sequence[Tensor] | Tensor) -> Decision:
        views, needed = self._views.split(images), self._decider.needs_similarities
        return self._decider.decide(ViewScores.compute(self.network, views, similarities=needed))

    def _try_prepare(self, item: OneImage) -> Tensor | str:
        """Return the prepared image, or the error."""
        try:
            return self.prepare(item)
        except ImageError as error:
            return error.reason
        except CrossXError as error:
            return str(error)


def class_number(name: str, classes: Sequence[str], *, listed: str = "model.json of the run") -> int:
    """Return the label of a class by its text (``names.class_name``); ``UsageError`` with the nearest if unknown.

    Args:
        name: The class.
        classes: All classes.
        listed: Where whoever gave the name finds them.
    """
    if name in classes:
        return classes.index(name)
    known = [class_name(known) for known in classes]
    if class_name(name) not in known:
        raise UsageError(
            f"unknown class {name!r}.{nearest(name, classes)} {listed} lists its {len(classes)} classes."
        )
    return known.index(class_name(name))
