"""Create the method that is trained, or build that of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crossx.data.config import Sampling
from crossx.data.fingerprints import fingerprints
from crossx.data.index import DatasetIndex, part_names
from crossx.data.transforms import preprocessing_for
from crossx.distributed import is_leader
from crossx.errors import CrossXError, UsageError, counted
from crossx.evaluation.classes import check_classes
from crossx.evaluation.training_images import read_training_images
from crossx.methods.base import Method
from crossx.methods.registry import check_options, create_method, method_class, method_options
from crossx.methods.start import Start, Transfer
from crossx.methods.weights import build_method, describe
from crossx.runs import ModelSpec, Run
from crossx.suggestions import nearest
from crossx.training.config import Config
from crossx.training.recovery import read_or_restore

SPLITTING = ("dataset", "val_fraction", "test_fraction", "split_seed", "train_on")
"""Options of ``data`` that decide which images are held out."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Created:
    """A method on the CPU.

    Attributes:
        method: The network and its objective.
        spec: Its description.
        transfer: What it took from another network, if it starts from one.
    """

    method: Method
    spec: ModelSpec
    transfer: Transfer | None = None


def create(config: Config, index: DatasetIndex, start: Start | None) -> Created:
    """Create a method for a dataset.

    Args:
        config: The options.
        index: The dataset.
        start: The network to start from, if any.

    Raises:
        UsageError: If an option cannot work.
        CrossXError: If the method needs what the dataset does not have, or weights cannot be read.
    """
    method = _create_method(config, index)
    if start is not None:
        # what the weights were trained with
        method.backbone.data_config |= {
            name: getattr(start.spec.preprocessing, name) for name in ("mean", "std", "interpolation")
        }
    spec = describe(
        method,
        classes=index.classes,
        preprocessing=preprocessing_for(config.data, method.backbone.data_config),
        dataset=index.name,
        levels=dict(index.levels),
    )
    return Created(method, spec, None if start is None else _take(start, method, spec, config, index))


def restore(run: Run, checkpoint: Mapping[str, Any], index: DatasetIndex) -> Created:
    """Build the method of a run, whose weights are those of the checkpoint once it is loaded.

    Args:
        run: The run.
        checkpoint: Its checkpoint.
        index: The dataset, which must have the run's classes.

    Raises:
        CrossXError: If it has others, or the run cannot be read.
    """
    spec = read_or_restore(run.spec, run.read_spec, checkpoint)
    check_classes(spec.classes, index.classes, index.name)
    method = build_method(spec)
    if (taken := checkpoint.get("taken")) is not None:
        method.taken = frozenset(taken)
    return Created(method, spec)


def choose_sampling(asked: Sampling | None, method: Method) -> Sampling:
    """Return how training images are drawn: as asked for, or as the method needs.

    Raises:
        UsageError: If the method needs another way than the one asked for.
    """
    needed = method.sampling
    if asked and needed and asked != needed:
        raise UsageError(
            f"method {method.name!r} needs data.sampling {needed}, not {asked}. Leave the option out, or give {needed}."
        )
    return asked or needed or "uniform"


def choose_parts(method: str, options: Mapping[str, Any], index: DatasetIndex) -> tuple[str, ...]:
    """Return the names of the parts in training batches; none for a method that does not use parts.

    Raises:
        CrossXError: If the method needs parts and the dataset has none.
        UsageError: If the dataset does not have a part of the option ``part_names``.
    """
    if not method_class(method).uses_parts:
        return ()
    known = part_names(index.split("train"))
    if not known:
        raise CrossXError(
            f"method {method!r} needs parts, and the training images of dataset {index.name!r} have none. Use cub or "
            "nabirds with the archive's parts/part_locs.txt, or synthetic."
        )
    # also those that no training image shows, such as the other side of a part
    known = part_names(index.records)
    asked = options.get("part_names")
    for name in asked or ():
        if name not in known:
            raise UsageError(
                f"part_names: dataset {index.name!r} has no part {name!r}.{nearest(name, known)} "
                f"It has: {', '.join(known)}."
            )
    return tuple(asked or known)


def _create_method(config: Config, index: DatasetIndex) -> Method:
    model = config.model
    options = dict(model.options)
    check_options(model.method, options)
    parts = choose_parts(model.method, options, index)
    if parts and "part_names" in method_options(model.method):
        options["part_names"] = list(parts)
    method = create_method(
        model.method,
        backbone=model.backbone,
        num_classes=len(index.classes),
        pretrained=model.pretrained and config.init is None,
        backbone_weights=model.backbone_weights,
        backbone_args=model.backbone_args,
        image_size=config.data.image_size,
        **options,
    )
    method.check_image_size(config.data.image_size)
    return method


def _take(start: Start, method: Method, spec: ModelSpec, config: Config, index: DatasetIndex) -> Transfer:
    """Copy what fits from another network, and say what does not."""
    transfer = Transfer(start, method, spec)
    transfer.copy(method)
    method.taken = transfer.taken
    log.info("init %s", transfer.describe())
    _warn_if_seen(start, config, index)
    return transfer


def _warn_if_seen(start: Start, config: Config, index: DatasetIndex) -> None:
    """Warn if the network to start from was trained on images that are held out now."""
    if not is_leader():
        return
    data = config.data
    index = index.with_validation(data.val_fraction, data.split_seed)
    held_out = ("test",) if data.train_on == "trainval" else ("val", "test")
    paths = [record.path for split in held_out for record in index.split(split)]
    if (known := read_training_images(start.run)) is not None:
        if seen := int(np.isin(fingerprints(paths), known).sum()):
            log.warning(
                "init %s: was trained on %d of the %s that are held out now: accuracies on these are too high.",
                start.name, seen, counted(len(paths), "image"),
            )  # fmt: skip
        return
    before = start.info.get("data") or {}
    same = config.data.root and start.info.get("data_root") == config.data.root
    now = asdict(config.data)
    if same and any(before.get(option) != now[option] for option in SPLITTING if option in before):
        log.warning(
            "init %s: was trained on images of %s split in another way: it may have seen images that are held out now.",
            start.name, config.data.root,
        )  # fmt: skip
