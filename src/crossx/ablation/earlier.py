"""Results of earlier ablations, which may be from other machines."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossx.ablation.runner import SPLIT, Trial, describe_training
from crossx.data.catalog import VARYING, read_configured
from crossx.data.fingerprints import fingerprints
from crossx.data.names import class_name
from crossx.errors import CrossXError, counted
from crossx.evaluation.predictions import relative_paths
from crossx.runs import read_json
from crossx.schema.run import AblationRunFile, check_file
from crossx.training.config import Config, ModelConfig

log = logging.getLogger(__name__)


def read_earlier(files: Sequence[Path], trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
    """Return those of the trials that are not done, but were trained before with the same options and seed.

    Args:
        files: Files ``results.json`` of ``crossx ablate``, of any suite.
        trials: The trials to look for.

    Returns:
        Trial -> its results, as in ``runs`` of ``summarize_suite``.

    Raises:
        CrossXError: If a file is missing, damaged or something else.
    """
    known: list[dict[str, Any]] = []
    for file in files:
        runs = read_json(file).get("runs")
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise CrossXError(f"{file}: not the results of `crossx ablate`: it has no list `runs`.")
        tested = [run for run in runs if "failed" not in run]
        for run in tested:
            check_file(AblationRunFile, run, f"{file}, training {run.get('variant')} {run.get('seed')}")
            known.append(run)
    trainings = {trial: describe_training(trial.config) for trial in trials} if known else {}
    methods = {trial.config.model.method for trial in trainings}
    defaults = {name: describe_training(Config(model=ModelConfig(method=name))) for name in methods}
    found: dict[Trial, dict[str, Any]] = {}
    for trial, training in trainings.items():
        of_method = defaults[trial.config.model.method]
        runs = [run for run in known if _is_same(run["training"], training, of_method)]
        if trial.is_done or not runs:
            continue
        if any(run["correct"] != runs[0]["correct"] for run in runs):
            raise CrossXError(
                f"{trial}: the earlier results have several different trainings of these options (of paths, only the "
                "last part is compared). Give one of the files."
            )
        twins = [other for other in found if trainings[other] == training]
        if twins:
            raise CrossXError(
                f"{trial} and {twins[0]} differ only in the folder of a path, which earlier results do not tell apart. "
                "Rename one, or leave out --earlier."
            )
        found[trial] = {
            key: value for key, value in runs[0].items() if key not in ("variant", "alternative", "seed")
        }
    return found


def _is_same(training: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Return whether a training had the options ``now``. One that did not exist then must have its default value."""
    return training.keys() <= now.keys() and all(
        value == (training[key] if key in training else defaults[key]) for key, value in now.items()
    )


def check_data(earlier: Mapping[Trial, Mapping[str, Any]]) -> None:
    """Check that the test images at hand are those of earlier results, also in their contents where these vary.

    Images that cannot be read are not told apart with ``data.bad_images skip``; ``summarize_suite`` finds them.

    Raises:
        CrossXError: If they are not, naming the trial; or if the data cannot be read.
    """
    found: dict[str, tuple[list[Path], list[str], str]] = {}
    # variants may differ in how they use the same images, which are read once
    read: dict[tuple[str | None, str], str | None] = {}
    by_name = 0
    for trial, results in earlier.items():
        data, contents = trial.config.data, results.get("contents")
        by_name += data.dataset in VARYING and contents is None
        if data.bad_images == "skip":
            continue
        if repr(data) not in found:
            index = read_configured(data)
            records, paths = index.split(SPLIT), relative_paths(index, SPLIT, data.root)
            images = describe_images(paths, [record.label for record in records], index.classes)
            found[repr(data)] = [record.path for record in records], paths, images
        files, paths, images = found[repr(data)]
        if images != results["images"]:
            raise CrossXError(
                f"{trial}: the earlier results are of other {SPLIT} images, labels or classes than those of "
                f"--data.root {data.root}. Leave out --earlier, or use the same data."
            )
        if contents is None:
            continue
        key = data.root, images
        if key not in read:
            read[key] = describe_contents(paths, fingerprints(files))
        if read[key] != contents:
            raise CrossXError(
                f"{trial}: the {SPLIT} images of --data.root {data.root} have the names of those of the earlier "
                "results, but other contents. Leave out --earlier, or use the same data."
            )
    if by_name:
        log.warning(
            "--earlier: the results of %s are from an earlier version: their images are known by name only.",
            counted(by_name, "training"),
        )


def describe_images(paths: Sequence[str], targets: Sequence[int], classes: Sequence[str]) -> str:
    """Return what identifies tested images: their paths below the root of the data, their labels and the classes."""
    names = [class_name(str(name)) for name in classes]
    lines = sorted((str(path), names[target]) for path, target in zip(paths, targets, strict=True))
    return _digest([lines, sorted(names)])


def describe_contents(paths: Sequence[str], contents: NDArray[np.uint64] | None) -> str | None:
    """Return what identifies the contents of tested images.

    Args:
        paths: Their paths below the root of the data.
        contents: uint64 (N,), their ``fingerprints``; None where their paths identify them, and then so is the result.
    """
    if contents is None:
        return None
    return _digest(sorted(zip(map(str, paths), contents.tolist(), strict=True)))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def pack(correct: NDArray[np.bool_]) -> str:
    """Return booleans (N,) as hexadecimal digits, four each; the last ones are filled up with 0."""
    return np.packbits(correct).tobytes().hex()


def unpack(digits: str, n: int) -> NDArray[np.bool_]:
    """Return the N booleans that ``pack`` made into digits."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=n).astype(bool)
