"""The known datasets (``readers/datasets.yaml``) and how to read each by name."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from crossx.caches import cache_folder
from crossx.data.config import DataConfig
from crossx.data.index import DatasetIndex, UntrainedClassError
from crossx.errors import CrossXError, UsageError, unknown
from crossx.runs import user_path
from crossx.suggestions import nearest
from crossx.yaml import load_yaml

OWN_DATA = ("folder", "table", "huggingface", "webdataset")
"""Formats of images of one's own: two datasets of that name have nothing else in common."""
VARYING = (*OWN_DATA, "synthetic")
"""Formats whose images are known by their contents only, since two datasets may have files of the same names."""
SHARED_OPTIONS = frozenset({"test_fraction", "split_seed"})
"""Options accepted for every dataset; archives with an official test split ignore them."""


class Counts(NamedTuple):
    """Classes, training images (official validation images included) and test images."""

    classes: int
    train: int
    test: int


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a dataset before it is on disk.

    Attributes:
        name: Its name on the command line.
        title: Its name in papers.
        homepage: Where it is described.
        download: Where to download it and what to unpack.
        licence: The terms of use, as far as they are published.
        size: Size of the download.
        reader: ``module:function`` that reads it; imported when needed.
        checksums: File name to ``md5:...`` and ``sha256:...``; empty where none is published.
        defects: Known defects, each with its source.
        table1: The counts in Table 1 of the Cross-X paper, None for a dataset that is not in it.
    """

    name: str
    title: str
    homepage: str
    download: str
    licence: str
    size: str
    reader: str
    checksums: Mapping[str, str] = field(default_factory=dict)
    defects: tuple[str, ...] = ()
    table1: Counts | None = None


def _load() -> dict[str, DatasetInfo]:
    text = resources.files("crossx.data").joinpath("readers/datasets.yaml").read_text(encoding="utf-8")
    infos = {}
    for name, entry in load_yaml(text, "datasets.yaml").items():
        table1 = Counts(**entry.pop("table1")) if "table1" in entry else None
        infos[name] = DatasetInfo(name, defects=tuple(entry.pop("defects", ())), table1=table1, **entry)
    return infos


DATASETS = _load()
"""Every dataset by name."""


def dataset_info(name: str) -> DatasetInfo:
    """Return what is known about a dataset.

    Raises:
        UsageError: If the name is unknown.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return DATASETS[name]


def read_dataset(name: str, root: str | Path | None, **options: Any) -> DatasetIndex:
    """Read a dataset from disk.

    Args:
        name: A name in ``DATASETS``.
        root: Its folder, or the table. None is for ``synthetic`` only, which is then drawn into the cache.
        **options: Options of its reader; None means the reader's default.

    Raises:
        UsageError: If the name or an option is unknown, an option belongs to another dataset, or the root is missing.
        CrossXError: If the files are missing or malformed.
    """
    info = dataset_info(name)
    module, function = info.reader.split(":")
    reader = getattr(importlib.import_module(module), function)
    accepted = list(inspect.signature(reader).parameters)[1:]
    given = {key: value for key, value in options.items() if value is not None}
    for key in sorted(given.keys() - SHARED_OPTIONS - set(accepted)):
        takes = f"It takes {', '.join(accepted)}." if accepted else "It takes none."
        raise UsageError(f"dataset {name!r} has no option {key!r}.{nearest(key, accepted)} {takes}")
    given = {key: value for key, value in given.items() if key in accepted}
    index: DatasetIndex = reader(dataset_root(name, root, given), **given)
    return index


def read_existing(name: str, root: str | Path | None, **options: Any) -> DatasetIndex:
    """Read a dataset to look at it, not to train on it.

    Never draws ``synthetic`` in a given root: a folder that does not exist is a typing error. Classes without training
    images, which ``read_dataset`` refuses, are returned for the caller to report.

    Raises:
        CrossXError: As ``read_dataset``, and if nothing has been drawn in the root.
        UsageError: As ``read_dataset``.
    """
    require_drawn(name, root)
    try:
        return read_dataset(name, root, **options)
    except UntrainedClassError as error:
        return error.index


def require_drawn(name: str, root: str | Path | None) -> None:
    """Raise ``CrossXError`` if the dataset is ``synthetic`` and nothing has been drawn in the given root."""
    if name != "synthetic" or root is None:
        return
    folder = user_path(root)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        problem = "is empty" if folder.exists() else "no such folder"
        raise CrossXError(
            f"{folder}: {problem}. `crossx fit` draws the synthetic dataset; here it is only read."
        )


def read_configured(config: DataConfig, *, other_images: bool = False) -> DatasetIndex:
    """Read the dataset that the ``--data.*`` options name, without the images that ``config.exclude`` lists.

    Args:
        config: The options.
        other_images: Whether there may be other images than in training, so that paths in ``config.exclude`` may be
            unknown.

    Raises:
        UsageError: As ``read_dataset``.
        CrossXError: As ``read_dataset`` and ``exclude.exclude``.
    """
    index = read_dataset(config.dataset, config.root, **_reader_options(config))
    if config.exclude is None:
        return index

    from crossx.data.exclude import exclude

    # before images are left out, so that the same ones are held out as without
    index = index.with_validation(config.val_fraction, config.split_seed)
    base = base_folder(configured_root(config))
    return exclude(index, user_path(config.exclude), base, strict=not other_images)


def dataset_title(name: str, root: str | Path | None) -> str:
    """Return the name of a dataset; one of ``OWN_DATA`` with that of its folder or file: ``folder photos``."""
    if name not in OWN_DATA or root is None:
        return name
    # imports pydantic
    from crossx.schema.base import shown

    return f"{name} {shown(Path(os.path.abspath(root)).name)}"


def configured_root(config: DataConfig) -> Path:
    """Return where ``read_configured`` looks; raises what ``dataset_root`` raises."""
    return dataset_root(config.dataset, config.root, _reader_options(config))


def _reader_options(config: DataConfig) -> dict[str, Any]:
    names = (
        *(
            "level",
            "num_classes",
            "images_per_class",
            "test_images_per_class",
            "seed",
            "image_column",
            "label_column",
        ),
        *("test_fraction", "split_seed"),
    )
    return {name: getattr(config, name) for name in names}


def base_folder(root: Path) -> Path:
    """Return the folder that the paths of a dataset's images are relative to."""
    return root.parent if root.is_file() else root


def dataset_root(name: str, root: str | Path | None, options: Mapping[str, Any]) -> Path:
    """Return where ``read_dataset`` looks: ``root``, or a synthetic set's folder in the cache.

    Raises:
        UsageError: If no root is given and the dataset is not ``synthetic``.
    """
    if root is not None:
        return user_path(root)
    if name != "synthetic":
        raise UsageError(f"dataset {name!r} needs --data.root: {dataset_info(name).download}.")
    # One folder per set: the reader refuses a folder that was drawn with other options.
    given = sorted({key for key, value in options.items() if value is not None} - SHARED_OPTIONS)
    return cache_folder() / "crossx" / "-".join(["synthetic", *(f"{key}={options[key]}" for key in given)])
