"""The training images that are nearest to an image, by a run's own features."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossx.data.index import Record, relative_path
from crossx.errors import CrossXError, UsageError, counted, first_line
from crossx.evaluation.data import training_records
from crossx.predict.embeddings import embed, network_digest, read_features, write_features
from crossx.predict.inputs import OneImage
from crossx.predict.results import Neighbor, Neighbors
from crossx.predict.search import VectorIndex, make_index
from crossx.runs import Run, check_output_file

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeighborIndex:
    """The features of a run's training images.

    Attributes:
        predictor: The run's network.
        names: Path of each of N images relative to ``base``.
        labels: Class number of each, int64 (N,).
        base: The folder of the training data.
        has_images: Whether the images were found there; else the index is that of an earlier call.
        index: Finds the nearest.
    """

    predictor: Predictor
    names: Sequence[str]
    labels: NDArray[np.int64]
    base: Path
    has_images: bool
    index: VectorIndex

    @classmethod
    def open(
        cls,
        predictor: Predictor,
        *,
        root: str | Path | None = None,
        approximate: bool | None = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> NeighborIndex:
        """Read the index of a run, after computing what is missing in it.

        ``RUN/neighbors.npz`` keeps the features with a checksum of the network, and the size and time of each image.
        Features of another network, or of an image that has changed, are computed again. If the training images are
        gone, an index of the same network is used as it is.

        Args:
            predictor: The network, loaded from a run folder.
            root: Folder of the training images, if it has moved.
            approximate: See ``make_index``.
            batch_size: Images per step.
            progress: Called with the number of images done and the total.

        Raises:
            UsageError: If the network is not that of a run folder, or usearch is needed and missing.
            CrossXError: If there are neither training images nor an index.
        """
        run = _run_of(predictor)
        try:
            records, base = _training_images(run, predictor, root)
        except CrossXError as error:
            stored = _read_index(run, predictor)
            if stored is None:
                raise CrossXError(
                    f"{run.path}: its training images cannot be read ({first_line(error)}). Give their folder as "
                    "--data.root of `crossx neighbors`, which keeps an index in the run."
                ) from error
            log.warning(
                "the training images cannot be read (%s): the neighbours are those of the index in %s.",
                first_line(error), run.neighbors,
            )  # fmt: skip
            names, labels, vectors, folder = stored
            return cls(predictor, names, labels, folder, False, make_index(vectors, approximate))
        names, labels, vectors = _compute(run, predictor, records, base, batch_size, progress)
        return cls(predictor, names, labels, base, True, make_index(vectors, approximate))

    def find(self, images: Iterable[OneImage], top: int = 5, batch_size: int = 16) -> Iterator[Neighbors]:
        """Yield the nearest training images of each image, nearest first.

        Args:
            images: Files, bytes or images; paths are not expanded.
            top: Neighbours per image, at most N.
            batch_size: Images per step.
        """
        for features in self.predictor.iter_image_features(images, batch_size):
            if features.vector is None:
                yield Neighbors(features.path, error=features.error)
            else:
                yield Neighbors(features.path, self.nearest(features.vector[None], top)[0])

    def nearest(self, vectors: NDArray[np.float32], top: int) -> list[tuple[Neighbor, ...]]:
        """Return the nearest training images of features (Q, D) of length 1, nearest first."""
        similarities, places = self.index.search(vectors, top)
        return [
            tuple(self._neighbor(int(place), float(value)) for place, value in zip(row, values, strict=True))
            for row, values in zip(places, similarities, strict=True)
        ]

    def _neighbor(self, place: int, similarity: float) -> Neighbor:
        name = self.names[place]
        label = self.predictor.classes[self.labels[place]]
        # features are kept in half precision, so that their length is not exactly 1
        return Neighbor(self.base / name, name, label, round(min(max(similarity, -1.0), 1.0), 6))


def _run_of(predictor: Predictor) -> Run:
    if predictor.origin is None:
        raise UsageError("neighbours need a run folder, with its training images; this network has none.")
    run = predictor.origin[0]
    if run.hub:
        raise UsageError(
            f"{run.hub}: neighbours need a run folder, and a model on the Hub has no training images."
        )
    return run


def _training_images(
    run: Run, predictor: Predictor, root: str | Path | None
) -> tuple[Sequence[Record], Path]:
    records, base = training_records(run, predictor.spec, root)
    base = base.absolute()
    if records and not any(record.path.is_file() for record in records):
        raise CrossXError(f"none of {counted(len(records), 'training image')} is in {base}")
    return records, base


def _compute(
    run: Run,
    predictor: Predictor,
    records: Sequence[Record],
    base: Path,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[str], NDArray[np.int64], NDArray[np.float32]]:
    names = [relative_path(record.path.absolute(), base) for record in records]
    keys = [_key(name, record.path) for name, record in zip(names, records, strict=True)]
    unreadable: dict[bytes, str] = {}
    before = _read_index(run, predictor)
    problem = _write_problem(run)
    known = embed(
        predictor,
        [record.path for record in records],
        keys,
        run.neighbors,
        writable=problem is None,
        batch_size=batch_size,
        progress=progress,
        unreadable=unreadable,
    )
    if not known:
        raise CrossXError(f"{run.path}: none of {counted(len(records), 'training image')} can be read.")
    if unreadable:
        log.warning("%s cannot be read and are left out.", counted(len(unreadable), "training image"))
    used = [number for number, key in enumerate(keys) if key in known]
    names = [names[number] for number in used]
    labels = np.array([records[number].label for number in used], dtype=np.int64)
    stored = {keys[number]: known[keys[number]] for number in used}
    vectors = np.stack(list(stored.values())).astype(np.float32)
    if _is_same(before, names, labels, vectors):
        pass
    elif problem is not None:
        log.warning("the index is not kept: %s", problem)
    else:
        write_features(
            run.neighbors, network_digest(predictor), stored,
            names=np.array(names, dtype=np.str_), labels=labels, base=np.array(str(base)),
        )  # fmt: skip
    return names, labels, vectors


def _key(name: str, path: Path) -> bytes:
    """Identify an image by its name, size and time of change."""
    try:
        state = path.stat()
        text = f"{name}\0{state.st_size}\0{state.st_mtime_ns}"
    except OSError:
        text = f"{name}\0missing"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _write_problem(run: Run) -> CrossXError | None:
    try:
        check_output_file(run.neighbors)
    except CrossXError as error:
        return error
    return None


def _read_index(
    run: Run, predictor: Predictor
) -> tuple[list[str], NDArray[np.int64], NDArray[np.float32], Path] | None:
    """Return names, labels, features and folder; None for an index that is unfinished, damaged or does not fit."""
    vectors = list(read_features(run.neighbors, network_digest(predictor)).values())
    if not vectors or vectors[0].shape != (predictor.feature_size,):
        return None
    try:
        with np.load(run.neighbors, allow_pickle=False) as arrays:
            names, labels, base = arrays["names"], arrays["labels"], arrays["base"]
    except Exception:  # an index that was not finished, or is damaged
        return None
    if names.shape != labels.shape or names.shape != (len(vectors),) or names.dtype.kind != "U":
        return None
    if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(predictor.classes):
        return None
    return names.tolist(), labels, np.stack(vectors).astype(np.float32), Path(str(base))


def _is_same(
    before: tuple[list[str], NDArray[np.int64], NDArray[np.float32], Path] | None,
    names: Sequence[str],
    labels: NDArray[np.int64],
    vectors: NDArray[np.float32],
) -> bool:
    return (
        before is not None
        and before[0] == names
        and np.array_equal(before[1], labels)
        and np.array_equal(before[2], vectors)
    )
