"""Read the images of an audit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossx.audit.alignment import SIDE
from crossx.data.exclude import written_path
from crossx.data.images import ImageError, inspect_image, read_pixels
from crossx.data.index import DatasetIndex, Record
from crossx.data.threads import map_ahead
from crossx.errors import CrossXError, counted


@dataclass(frozen=True)
class Images:
    """The readable images of a dataset, each once, and why the others are not.

    Attributes:
        records: N records.
        paths: Their paths relative to the dataset's folder.
        digests: Checksums of their files.
        thumbnails: uint8 (N, SIDE, SIDE), grey, stretched to a square.
        pixels: Their numbers of pixels.
        unreadable: Path and reason of each other image.
    """

    records: list[Record]
    paths: list[str]
    digests: list[bytes]
    thumbnails: NDArray[np.uint8]
    pixels: list[int]
    unreadable: list[tuple[str, str]]


def read_images(index: DatasetIndex, base: Path, progress: Callable[[int, int], None]) -> Images:
    """Decode every image of a dataset once.

    Args:
        index: The dataset.
        base: Its folder, or that of its table.
        progress: Called with the number of images done and the total.

    Raises:
        CrossXError: If no image can be read.
    """
    # a table may list an image twice
    records = list({record.path: record for record in index.records}.values())
    readable, paths, unreadable = [], [], []
    found = map_ahead(_read_image, (record.path for record in records), len(os.sched_getaffinity(0)))
    for done, (record, image) in enumerate(zip(records, found, strict=True), start=1):
        path = written_path(record.path, base)
        if isinstance(image, str):
            unreadable.append((path, image))
        else:
            paths.append(path)
            readable.append((record, *image))
        progress(done, len(records))
    if not readable:
        example = " ({}: {})".format(*unreadable[0]) if unreadable else ""
        raise CrossXError(
            f"dataset {index.name!r}: none of {counted(len(records), 'image')} can be read{example}."
        )
    kept, digests, thumbnails, pixels = (list(column) for column in zip(*readable, strict=True))
    return Images(kept, paths, digests, np.stack(thumbnails), pixels, unreadable)


def _read_image(path: Path) -> tuple[bytes, NDArray[np.uint8], int] | str:
    # also what decoding for viewing tolerates
    problem, _ = inspect_image(path)
    if problem is not None:
        return problem
    try:
        pixels = read_pixels(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except ImageError as error:
        return error.reason
    except OSError as error:
        return str(error.strerror or error)
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return digest, np.asarray(grey), pixels.shape[0] * pixels.shape[1]
