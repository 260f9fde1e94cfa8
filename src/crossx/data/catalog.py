"""The datasets by name: where each is to be had, on which terms, what is wrong with it, and what reads it."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossx.data.config import DataConfig
from crossx.data.index import DatasetIndex
from crossx.errors import UsageError, nearest, unknown

SHARED_OPTIONS = frozenset({"test_fraction", "split_seed"})
"""Options that every dataset may be given; archives with an official test split have no use for them."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a dataset before it is on disk.

    Attributes:
        name: Its name on the command line.
        title: Its name in papers.
        homepage: Where it is described.
        download: Where it is to be had, and what to unpack.
        licence: The terms of use, as far as they are published.
        size: Size of the download.
        checksums: File name to ``md5:...`` and ``sha256:...``; empty where none is published.
        defects: What is known to be wrong with it, each with its source.
        table1: Classes, training and test images in Table 1 of the Cross-X paper, None where it is not in it.
            Training images include an official validation split.
        reader: ``module:function`` that reads it; imported when needed.
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
    table1: tuple[int, int, int] | None = None


# Checksums: md5 of CUB, Cars and NABirds as the loaders of many projects check them (torchvision up to 0.15 for
# Cars); md5 of Aircraft as linked from its README and checked by torchvision for R; sha256 and bytes of Cars, CUB
# and Dogs from TensorFlow Datasets (tensorflow_datasets/url_checksums).
_INFOS = (
    DatasetInfo(
        name="cub",
        title="Caltech-UCSD Birds-200-2011",
        homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        download=(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz; unpack it, --data.root is the "
            "folder CUB_200_2011"
        ),
        licence="non-commercial research and education; the images belong to their photographers",
        size="1.15 GB (1,150,585,339 bytes)",
        checksums={
            "CUB_200_2011.tgz": (
                "md5:97eceeb196236b17998738112f37df78 "
                "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
            )
        },
        defects=(
            "Images overlap with ImageNet, so a pretrained backbone may have seen test images (warning on the "
            "homepage); 23 pairs are identical files (http://guopei.github.io/2016/Overlap-Between-Imagenet-And-CUB/).",
            "At least 4% of the labels are wrong (Van Horn et al., CVPR 2015, "
            "https://openaccess.thecvf.com/content_cvpr_2015/html/Horn_Building_a_Bird_2015_CVPR_paper.html).",
        ),
        table1=(200, 5994, 5794),
        reader="crossx.data.cub:read_cub",
    ),
    DatasetInfo(
        name="nabirds",
        title="NABirds",
        homepage="https://dl.allaboutbirds.org/nabirds",
        download=(
            "a form on the homepage gives the link to nabirds.tar.gz; unpack it, --data.root is the folder nabirds"
        ),
        licence="terms of the Cornell Lab of Ornithology, to be accepted on the homepage before the download",
        size="not published",
        checksums={"nabirds.tar.gz": "md5:df21a9e4db349a14e2b08adfd45873bd"},
        defects=(
            "Classes are species and, where they look different, their sexes, ages and morphs: 555 classes are "
            "about 400 species (homepage).",
        ),
        table1=(555, 23929, 24633),
        reader="crossx.data.nabirds:read_nabirds",
    ),
    DatasetInfo(
        name="cars",
        title="Stanford Cars",
        homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (down)",
        download=(
            "the site is down; copies of the original files are linked in "
            "https://github.com/pytorch/vision/issues/7545. --data.root is the folder with car_ims/ and "
            "cars_annos.mat, or with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat"
        ),
        licence="none published with the files",
        size="1.96 GB in two archives (979,269,282 and 977,350,468 bytes)",
        checksums={
            "car_ims.tgz": "md5:d5c8f0aa497503f355e17dc7886c3f14",
            "cars_annos.mat": "md5:b407c6086d669747186bd1d764ff9dbc",
            "cars_train.tgz": (
                "md5:065e5b463ae28d29e77c1b4b166cfe61 "
                "sha256:512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288"
            ),
            "cars_test.tgz": (
                "md5:4ce7ebf6a94d07f1952d94dd34c4d501 "
                "sha256:bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243"
            ),
            "car_devkit.tgz": (
                "md5:c3b158d763b6e2245038c8ad08e45376 "
                "sha256:b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd"
            ),
            "cars_test_annos_withlabels.mat": (
                "md5:b0a2b23655a3edd16d84508592a98d10 "
                "sha256:790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05"
            ),
        },
        defects=(
            "The original site answers 404 since 2023 (https://github.com/pytorch/vision/issues/7545).",
            "Copies on Kaggle have file names that do not match the .mat files "
            "(https://github.com/OpenGVLab/CaFo/issues/4): compare the checksums.",
            "The devkit's cars_test_annos.mat has no labels; cars_test_annos_withlabels.mat is a file of its own "
            "(https://github.com/tensorflow/datasets/issues/1218).",
        ),
        table1=(196, 8144, 8041),
        reader="crossx.data.cars:read_cars",
    ),
    DatasetInfo(
        name="dogs",
        title="Stanford Dogs",
        homepage="http://vision.stanford.edu/aditya86/ImageNetDogs/",
        download=(
            "images.tar, annotation.tar and lists.tar on the homepage; unpack them in one folder, --data.root is it"
        ),
        licence="that of ImageNet, where the images come from: non-commercial research and education",
        size="816 MB (793,579,520 + 21,852,160 + 481,280 bytes)",
        checksums={
            "images.tar": (
                "md5:1bb1f2a596ae7057f99d7d75860002ef "
                "sha256:a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"
            ),
            "annotation.tar": (
                "md5:4298cc0031f6bc6e74612ac83b5988e2 "
                "sha256:662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd"
            ),
            "lists.tar": (
                "md5:edbb9f16854ec66506b5f09b583e0656 "
                "sha256:34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"
            ),
        },
        defects=(
            "All images come from ImageNet (homepage): a backbone pretrained on ImageNet has seen test images "
            "with their labels, so accuracies say little about unseen dogs.",
        ),
        table1=(120, 12000, 8580),
        reader="crossx.data.dogs:read_dogs",
    ),
    DatasetInfo(
        name="aircraft",
        title="FGVC-Aircraft (2013b)",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        download=(
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz; unpack it, "
            "--data.root is the folder fgvc-aircraft-2013b"
        ),
        licence="non-commercial research only; the photographers keep their copyright (README of the archive)",
        size="2.75 GB",
        checksums={"fgvc-aircraft-2013b.tar.gz": "md5:d4acdd33327262359767eeaa97a4f732"},
        defects=(
            "Each image has a banner of 20 pixels at the bottom with the photographer's name, to be cut off "
            "(homepage): --data.crop_bottom 20.",
            "Table 1 counts the official train and val splits together as training images.",
        ),
        table1=(100, 6667, 3333),
        reader="crossx.data.aircraft:read_aircraft",
    ),
    DatasetInfo(
        name="folder",
        title="Your own images, a folder a class",
        homepage="none",
        download="--data.root is a folder with one folder a class, or with train/, val/ and test/ of such folders",
        licence="yours",
        size="any",
        reader="crossx.data.folder:read_folder",
    ),
    DatasetInfo(
        name="table",
        title="Your own images, listed in a table",
        homepage="none",
        download="--data.root is a CSV or Parquet file with the columns path, label and, optional, split",
        licence="yours",
        size="any",
        reader="crossx.data.table:read_table",
    ),
    DatasetInfo(
        name="synthetic",
        title="Synthetic birds",
        homepage="none",
        download="drawn on first use into --data.root, by default into the user's cache",
        licence="Apache-2.0, as this package that draws it",
        size="none",
        reader="crossx.data.synthetic:read_synthetic",
    ),
)

DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _INFOS}
"""Every dataset by name."""


def dataset_info(name: str) -> DatasetInfo:
    """Return what is known about a dataset.

    Raises:
        UsageError: If there is none of this name.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return DATASETS[name]


def read_dataset(name: str, root: str | Path | None, **options: Any) -> DatasetIndex:
    """Read a dataset from disk.

    Args:
        name: A name in ``DATASETS``.
        root: Its folder, or the table. None is for ``synthetic`` alone, which then has its place in the cache.
        **options: Options of its reader. Those that are None are left at the reader's default.

    Raises:
        UsageError: If the name or an option is unknown, an option is another dataset's, or the root is not given.
        CrossXError: If the files are missing or wrong.
    """
    info = dataset_info(name)
    module, function = info.reader.split(":")
    reader = getattr(importlib.import_module(module), function)
    accepted = list(inspect.signature(reader).parameters)[1:]
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() - SHARED_OPTIONS - set(accepted):
        takes = f"It takes {', '.join(accepted)}." if accepted else "It takes none."
        raise UsageError(f"dataset {name!r} has no option {key!r}.{nearest(key, accepted)} {takes}")
    given = {key: value for key, value in given.items() if key in accepted}
    index: DatasetIndex = reader(dataset_root(name, root, given), **given)
    return index


def read_configured(config: DataConfig) -> DatasetIndex:
    """Read the dataset that the options of ``--data.*`` name; errors as ``read_dataset``."""
    return read_dataset(
        config.dataset,
        config.root,
        level=config.level,
        num_classes=config.num_classes,
        images_per_class=config.images_per_class,
        test_fraction=config.test_fraction,
        split_seed=config.split_seed,
    )


def dataset_root(name: str, root: str | Path | None, options: Mapping[str, Any]) -> Path:
    """Return where ``read_dataset`` looks: ``root``, or the place in the cache of a synthetic set.

    Raises:
        UsageError: If no root is given and the dataset is not ``synthetic``.
    """
    if root is not None:
        return Path(root).expanduser()
    if name != "synthetic":
        raise UsageError(f"dataset {name!r} needs --data.root: {dataset_info(name).download}.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    # Each set has a folder of its own: the reader refuses one that was drawn with other options.
    return cache / "crossx" / "-".join(["synthetic", *(f"{key}={options[key]}" for key in sorted(options))])
