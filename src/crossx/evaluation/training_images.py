"""Recognise the images that a run was trained on, also in another folder. Imports no torch."""

from __future__ import annotations

import io
import logging
import os

import numpy as np
from numpy.typing import NDArray

from crossx.data.catalog import OWN_DATA, VARYING
from crossx.data.config import DataConfig
from crossx.data.fingerprints import UNREADABLE, fingerprints
from crossx.data.index import DatasetIndex
from crossx.evaluation.data import trained_splits
from crossx.runs import ModelSpec, Run, atomic_path

log = logging.getLogger(__name__)


def write_training_images(run: Run, config: DataConfig, index: DatasetIndex) -> None:
    """Write the fingerprints of the images that a run is trained on, for ``count_trained``."""
    splits = trained_splits(run, config)
    paths = {record.path for record in index.records if record.split in splits}
    found = np.unique(fingerprints([*paths]))
    # not into the file itself: numpy does not tell that a disk is full
    content = io.BytesIO()
    np.save(content, found[found != UNREADABLE])
    with atomic_path(run.images) as temporary:
        temporary.write_bytes(content.getvalue())


def count_trained(
    run: Run, spec: ModelSpec, config: DataConfig, index: DatasetIndex, split: str,
    found: NDArray[np.uint64] | None = None,
) -> int:  # fmt: skip
    """Return how many images of a split a run was trained on.

    Images are recognised by their contents. Those of a published dataset are also known by its name, in case they
    were compressed again. A run without fingerprints, as of an earlier version or a shared one, knows its own images by
    the folder and their number.

    Args:
        run: The run.
        spec: Its description.
        config: Where the images are.
        index: The images.
        split: Their split.
        found: Fingerprints of the images of the split, if they are known already.
    """
    records = index.split(split)
    known = read_training_images(run)
    if known is not None:
        found = fingerprints([record.path for record in records]) if found is None else found
        seen = int(np.isin(found, known).sum())
        if seen or config.dataset in VARYING:
            return seen
    named = split in trained_splits(run, config) and config.dataset == spec.dataset
    return len(records) if named and _is_own_folder(run, config, len(records), split) else 0


def is_most(seen: int, images: int) -> bool:
    """Say whether so many of the images were trained on that results on them say nothing about new images."""
    return 2 * seen > images


def _is_own_folder(run: Run, config: DataConfig, images: int, split: str) -> bool:
    """Say whether images of the dataset that a run was trained on are those of the run."""
    info = run.read_info()
    root = info.get("data_root")
    if config.dataset not in OWN_DATA or None in (root, config.root):
        return True
    same_folder = os.path.abspath(str(root)) == os.path.abspath(str(config.root))
    return same_folder or (info.get("images") or {}).get(split) == images


def read_training_images(run: Run) -> NDArray[np.uint64] | None:
    """Return the fingerprints of the images that a run was trained on, (N,), each once; None if it has none."""
    known = _load(run)
    if known is None and run.images.is_file():
        log.warning("%s: damaged: the images trained on are known by their dataset only.", run.images)
    return known


def has_training_images(run: Run) -> bool:
    """Say whether a run has the fingerprints of its training images, undamaged."""
    return _load(run) is not None


def _load(run: Run) -> NDArray[np.uint64] | None:
    try:
        with run.images.open("rb") as file:
            known: NDArray[np.uint64] = np.load(file, allow_pickle=False)
    except Exception:  # numpy has many, with advice for other files
        return None
    return known if known.dtype == np.uint64 and known.ndim == 1 else None
