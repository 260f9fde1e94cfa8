"""The dataset of a run, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from crossx.data.catalog import base_folder, configured_root, read_configured, require_drawn
from crossx.data.config import DataConfig
from crossx.data.index import DatasetIndex, Record
from crossx.errors import CrossXError, first_line
from crossx.evaluation.classes import check_classes
from crossx.runs import ModelSpec, Run


class DataOptions(TypedDict, total=False):
    """The data to measure a run on; defaults are those of the training.

    Attributes:
        root: Folder of the data.
        dataset: Name of the dataset.
        batch_size: Images per step.
        num_workers: Processes that load images.
        image_column: Column of the images, of a dataset that has columns.
        label_column: Column, or field of a ``.json``, of the labels, of a dataset that has columns or fields.
    """

    root: str | Path | None
    dataset: str | None
    batch_size: int | None
    num_workers: int | None
    image_column: str | None
    label_column: str | None


def read_data(run: Run, spec: ModelSpec, **options: Unpack[DataOptions]) -> tuple[DataConfig, DatasetIndex]:
    """Read which images there are in the dataset of a run, or in another one with the same classes.

    Images that the training left out (``--data.exclude``) are left out here, too. Arguments and errors: as of
    ``subject.open_data``.
    """
    info = run.read_info()
    if not info and options.get("root") is None and run.remedy:
        raise CrossXError(f"{run.info}: no such file.{run.remedy}")
    config = _data_config(info, spec, **options)
    if config.exclude is not None and run.excluded.is_file():
        config = replace(config, exclude=str(run.excluded))
    if options.get("root") is not None:
        require_drawn(config.dataset, config.root)
    index = read_configured(config, other_images=True)
    check_classes(spec.classes, index.classes, index.name)
    return config, index


def trained_splits(run: Run, config: DataConfig) -> tuple[str, ...]:
    """Return the splits whose images a run was trained on."""
    # the released checkpoints were trained on everything but test
    on_all = config.train_on == "trainval" or run.read_info().get("status") == "imported"
    return ("train", "val") if on_all else ("train",)


def training_records(
    run: Run, spec: ModelSpec, root: str | Path | None = None
) -> tuple[tuple[Record, ...], Path]:
    """Return the images that a run was trained on, each once, and the folder that their paths are relative to.

    Args:
        run: The run.
        spec: Its model.
        root: The images' folder or table, if it has moved.

    Raises:
        CrossXError: As ``read_data``.
    """
    config, index = read_data(run, spec, root=root)
    index = index.with_validation(config.val_fraction, config.split_seed)
    splits = trained_splits(run, config)
    records = {record.path: record for record in index.records if record.split in splits}
    return tuple(records.values()), base_folder(configured_root(config))


def _data_config(
    info: Mapping[str, Any],
    spec: ModelSpec,
    *,
    root: str | Path | None = None,
    dataset: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DataConfig:
    known = {item.name for item in fields(DataConfig)}
    trained = {key: value for key, value in (info.get("data") or {}).items() if key in known}
    # the recorded path may be relative to another working folder
    trained["root"] = info.get("data_root") or trained.get("root")
    # without a cache, since each image is read once
    try:
        config = DataConfig(**{"dataset": spec.dataset, **trained, "cache": "none"})
    except TypeError as error:
        raise CrossXError(f"run.json: data: an option is of the wrong type ({first_line(error)}).") from error
    if dataset is not None and dataset != config.dataset:
        # root and reader options belong to the dataset of the training
        config = replace(
            config,
            dataset=dataset,
            root=None,
            level=None,
            num_classes=None,
            images_per_class=None,
            test_images_per_class=None,
            seed=None,
            image_column=None,
            label_column=None,
            exclude=None,
        )
    given: dict[str, Any] = {
        "root": None if root is None else str(root),
        "eval_batch_size": batch_size,
        "num_workers": num_workers,
        "image_column": image_column,
        "label_column": label_column,
    }
    return replace(config, **{name: value for name, value in given.items() if value is not None})
