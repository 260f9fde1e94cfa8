"""The data loaders of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from crossx.data.cache import PixelCache, open_cache, stored_images
from crossx.data.config import DataConfig
from crossx.data.dataset import ImageDataset, ImageLoader, collate
from crossx.data.images import ImageError, inspect_image, printable, scaled_note
from crossx.data.index import SPLITS, DatasetIndex, Record
from crossx.data.sampler import Draw, EpochSampler, EvaluationSampler
from crossx.data.threads import map_ahead
from crossx.data.transforms import CachedForm, Normalize, Transform, eval_transform, train_transform
from crossx.data.views import StoredViews
from crossx.distributed import world_size
from crossx.errors import CrossXError, counted, first_few
from crossx.runs import Preprocessing, user_path

MAX_WORKERS = 8
MAX_LISTED = 10

log = logging.getLogger(__name__)


class DataModule:
    """Loads batches of (images (B, 3, S, S) uint8, targets (B,) int64), for training with ``parts`` also these.

    The loaders return bytes, a quarter of the size of floats; ``to_device`` moves a batch to the device and normalises
    it there.

    Args:
        index: The dataset; without a validation split, ``config.val_fraction`` of its training images becomes one.
        preprocessing: How images are prepared, see ``preprocessing_for``.
        config: The ``--data.*`` options.
        seed: The run's seed, for order and augmentation of the training images.
        parts: Names of N parts. With them, training batches have a third tensor, (B, N, 3): x, y in pixels of the
            image, and visible (1 or 0).

    Attributes:
        index: The dataset with its validation split, without skipped images.
        normalize: Converts bytes to normalised floats.
        skipped: Path and reason of each image that ``check_images`` removed.
        processes: Number of processes on this machine that load images at the same time and share its cores.
    """

    def __init__(
        self,
        index: DatasetIndex,
        preprocessing: Preprocessing,
        config: DataConfig,
        seed: int,
        parts: Sequence[str] = (),
    ) -> None:
        self.index = index.with_validation(config.val_fraction, config.split_seed)
        self.preprocessing = preprocessing
        self.config = config
        self.seed = seed
        self.parts = tuple(parts)
        self.skipped: list[tuple[Path, str]] = []
        self.processes = 1
        self.normalize = Normalize(preprocessing)
        self._caches: dict[str, tuple[PixelCache, CachedForm]] = {}

    def to_device(self, batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        """Move a batch to a device and convert its images to normalised float32."""
        images, *others = (tensor.to(device, non_blocking=True) for tensor in batch)
        return self.normalize(images), *others

    @property
    def num_workers(self) -> int:
        """Worker processes per loader: the option, else this process's share of the cores, at most 8."""
        if self.config.num_workers is not None:
            return self.config.num_workers
        return max(1, min(MAX_WORKERS, _cores() // self.processes))

    def check_images(self, splits: Sequence[str] = ()) -> None:
        """Decode every image once, before training, except JPEGs in the cache of an earlier run.

        With ``bad_images: skip`` unreadable images are moved from ``index`` to ``skipped``.

        Args:
            splits: Only those of these splits, in evaluation; by default all, for training.

        Raises:
            CrossXError: If images cannot be read and ``bad_images`` is ``stop``; the first ten are named.
        """
        records = [record for record in self.index.records if record.split in (splits or SPLITS)]
        stored = self._stored()
        paths = [record.path for record in records if record.path not in stored]
        # Pillow releases the interpreter lock: threads are as fast as processes and start at once
        found = list(map_ahead(inspect_image, paths, max(1, self.num_workers)))
        bad = [
            (path, problem) for path, (problem, _) in zip(paths, found, strict=True) if problem is not None
        ]
        if note := scaled_note(bits for _, bits in found):
            log.warning("%s.", note)
        listed = first_few([f"{printable(path)}: {problem}" for path, problem in bad], MAX_LISTED, "; ")
        found_bad = f"{len(bad):,} of {counted(len(records), 'image')} cannot be read"
        if bad and self.config.bad_images == "stop":
            # only training has the option
            remedy = (
                "Replace them" if splits else "Replace them, or leave them out with --data.bad_images skip"
            )
            missing = all(problem == "no such file" for _, problem in bad)
            if self.config.dataset == "table" and self.config.root and missing and len(bad) == len(records):
                # such as the predictions of images elsewhere
                folder = printable(user_path(self.config.root).absolute().parent)
                remedy = f"The paths of a table are relative to its folder, {folder}: move it, or write absolute paths"
            raise CrossXError(f"{found_bad}: {listed}. {remedy}.")
        if bad:
            log.warning("%s and %s left out: %s.", found_bad, "is" if len(bad) == 1 else "are", listed)
        self.skipped += bad
        left_out = {path for path, _ in bad}
        kept = tuple(record for record in self.index.records if record.path not in left_out)
        self.index = replace(self.index, records=kept)

    def _stored(self) -> set[Path]:
        """Return the JPEGs that an earlier run has stored in ``data.cache disk``."""
        if self.config.cache != "disk":
            return set()
        training = self._train_splits()
        found = set()
        for splits, transform, parts in (
            (training, self._train_transform(), self.parts),
            (("val",) if self.holds_out else (), eval_transform(self.preprocessing), ()),
        ):
            paths = [record.path for record in self.index.records if record.split in splits]
            try:
                found |= stored_images(paths, transform, folder=self._cache_folder, decoded_only=bool(parts))
            except ImageError:
                # told with all others that cannot be read
                continue
        # of other formats, the bits in use are counted
        return {path for path in found if path.suffix.lower() in (".jpg", ".jpeg")}

    def _train_splits(self) -> tuple[str, ...]:
        return ("train", "val") if self.config.train_on == "trainval" else ("train",)

    def train_records(self) -> tuple[Record, ...]:
        """Return the records to train on, see ``config.train_on``.

        Raises:
            CrossXError: If a class has none, since it could never be predicted.
        """
        splits = self._train_splits()
        records = tuple(record for record in self.index.records if record.split in splits)
        trained = {record.label for record in records}
        missing = [repr(name) for label, name in enumerate(self.index.classes) if label not in trained]
        if missing:
            why = f" ({len(self.skipped)} unreadable ones were skipped)" if self.skipped else ""
            raise CrossXError(
                f"dataset {self.index.name!r}: {len(missing)} of {len(self.index.classes)} classes have no training "
                f"image{why}: {first_few(missing, MAX_LISTED, '; ')}. Add images to them, or remove these classes."
            )
        return records

    def train_dataloader(self) -> ImageLoader:
        """Return the training loader, with a new random order and augmentation each epoch."""
        return self._train_loader()

    def whole_train_loader(self) -> ImageLoader:
        """Return a training loader that gives every rank all images, in batches as large as those of all ranks."""
        return self._train_loader(dealt=False)

    @property
    def holds_out(self) -> bool:
        """Whether there are validation images that are not trained on."""
        return self.config.train_on != "trainval" and bool(self.index.split("val"))

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Return the validation loader, an empty list if no images are held out."""
        return self.eval_loader("val") if self.holds_out else []

    def test_dataloader(self) -> ImageLoader:
        """Return the loader of the test split."""
        return self.eval_loader("test")

    def views_loader(self, draws: Sequence[Draw]) -> ImageLoader:
        """Return a loader of these draws of the training images, in order, the same on every rank."""
        dataset, _ = self._train_images()
        return self._loader(dataset, draws, self.config.batch_size)

    def stored_loader(self, stored: StoredViews, *, dealt: bool = True) -> ImageLoader:
        """Return a training loader of maps instead of images, in the same order and batches as that of images."""
        batch_size = self._train_batch(dealt)
        sampler = self._train_sampler(stored.labels, batch_size, dealt)
        return self._loader(stored, sampler, batch_size, workers=0)

    def eval_loader(
        self,
        split: str,
        *,
        dealt: bool = True,
        transform: Transform | None = None,
        workers: int | None = None,
    ) -> ImageLoader:
        """Return a loader of one split without augmentation, in the order of its records.

        Args:
            split: Name of the split.
            dealt: Distribute the images over the ranks; False gives the calling rank all of them.
            transform: Prepares the images; by default ``eval_transform``.
            workers: Processes that load images; by default ``num_workers``.

        Raises:
            CrossXError: If the split is empty.
        """
        records = self.index.split(split)
        if not records:
            present = [name for name in SPLITS if self.index.split(name)]
            raise CrossXError(
                f"dataset {self.index.name!r} has no {split} images; it has: {', '.join(present) or 'none at all'}."
            )
        if transform is None:
            transform = eval_transform(self.preprocessing)
            self._open_cache(split, records, transform)
        dataset = self._dataset(split, records, transform)
        batch_size = self.config.eval_batch_size or self.config.batch_size
        return self._loader(dataset, EvaluationSampler(len(records), dealt), batch_size, workers)

    def open_caches(self) -> None:
        """Reserve the space for decoded images, if a cache is configured.

        Raises:
            UsageError: If there is not enough space.
        """
        if self.config.cache != "none":
            self.train_dataloader()
            self.val_dataloader()

    def _train_loader(self, dealt: bool = True) -> ImageLoader:
        dataset, labels = self._train_images()
        batch_size = self._train_batch(dealt)
        return self._loader(dataset, self._train_sampler(labels, batch_size, dealt), batch_size)

    def _train_batch(self, dealt: bool) -> int:
        return self.config.batch_size if dealt else self.config.batch_size * world_size()

    def _train_sampler(self, labels: Sequence[int], batch_size: int, dealt: bool) -> EpochSampler:
        return EpochSampler(labels, self.seed, self.config.sampling or "uniform", batch_size, dealt)

    def _train_images(self) -> tuple[ImageDataset, list[int]]:
        """Return the augmented training images, and their labels."""
        records, transform = self.train_records(), self._train_transform()
        # parts move with each step
        self._open_cache("train", records, transform, decoded_only=bool(self.parts))
        dataset = self._dataset("train", records, transform, self.parts)
        return dataset, [record.label for record in records]

    def _train_transform(self) -> Transform:
        config = self.config
        return train_transform(
            self.preprocessing, config.augmentation, hflip=config.hflip, random_erasing=config.random_erasing
        )

    def _dataset(
        self, name: str, records: Sequence[Record], transform: Transform, parts: Sequence[str] = ()
    ) -> ImageDataset:
        """Return images that are read from the cache ``name``, if there is one with what ``transform`` needs."""
        read: Callable[[Path], Tensor] = transform.read
        if name in self._caches:
            cache, kept = self._caches[name]
            for form in transform.forms():
                if form.key == kept.key:
                    transform, read = form.then, partial(cache.read, prepare=form.read)
        return ImageDataset(records, transform, self.seed, read, parts)

    @property
    def _cache_folder(self) -> Path | None:
        return user_path(self.config.cache_folder) if self.config.cache_folder else None

    def _open_cache(
        self, name: str, records: Sequence[Record], transform: Transform, *, decoded_only: bool = False
    ) -> None:
        """Open a cache, if one is configured and it is not open yet."""
        kind = self.config.cache
        if kind == "none" or name in self._caches:
            return
        paths = [record.path for record in records]
        cache, form, summary = open_cache(
            kind, name, paths, transform, folder=self._cache_folder, decoded_only=decoded_only
        )
        self._caches[name] = cache, form
        log.info(summary)

    def _loader(
        self,
        dataset: ImageDataset | StoredViews,
        sampler: EpochSampler | EvaluationSampler | Sequence[Draw],
        batch_size: int,
        workers: int | None = None,
    ) -> ImageLoader:
        workers = self.num_workers if workers is None else workers
        return ImageLoader(
            cast(ImageDataset, dataset),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # each iteration draws a seed for its workers, which must not advance the generator of dropout
            generator=torch.Generator(),
        )


def _cores() -> int:
    # a container or a batch system may grant fewer cores than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
