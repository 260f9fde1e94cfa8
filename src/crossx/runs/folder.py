"""The paths of a run folder, and finding a run from what the user gives."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crossx.commands import command
from crossx.errors import CrossXError, UsageError
from crossx.hub import HubModel, download_model
from crossx.runs.files import check_files, read_config, read_json, read_results
from crossx.runs.nearby import nearest_run, run_around
from crossx.runs.spec import ModelSpec, NewerSchemaError

EXPORT_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "safetensors": ".safetensors"}
"""Format of `crossx export` -> suffix of its files."""
EXPORTED = (".onnx", ".xml", ".pt2")
"""Those that no other file of crossx has."""
WITHOUT_WEIGHTS = frozenset({
    ".json", ".yaml", ".yml", ".csv", ".html", ".md", ".tex", ".log", ".txt", ".png", ".jpg", ".npy",
})  # fmt: skip
"""Suffixes of the other files in a run folder, and next to it."""
PREDICTS_ALONE = "only `crossx predict` and `crossx serve` take an exported file. Give the run instead."


T = TypeVar("T")

COMPLETE = ("finished", "imported")
"""Status of runs with nothing left to train."""

log = logging.getLogger(__name__)


class _File:
    """The path of a file or folder in a run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.path / self._name


class RunFileError(CrossXError):
    """A file of a run that cannot be read.

    Attributes:
        problem: What is wrong, without what to do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        super().__init__(problem + remedy)


@dataclass(frozen=True)
class Run:
    """A run folder and the paths in it.

    Attributes:
        path: The folder.
        hub: Name of a model downloaded from the Hub; its folder is in the Hub's cache and must not be written to.
    """

    path: Path
    hub: str = ""

    config = _File("config.yaml")
    spec = _File("model.json")
    weights = _File("model.safetensors")
    info = _File("run.json")
    checkpoints = _File("checkpoints")
    best = _File("checkpoints/best.ckpt")
    excluded = _File("exclude.csv")
    images = _File("images.npy")
    neighbors = _File("neighbors.npz")
    profile = _File("profile.json")
    last = _File("checkpoints/last.ckpt")
    previous = _File("checkpoints/previous.ckpt")
    checksums = _File("checkpoints/SHA256SUMS")

    def read_spec(self) -> ModelSpec:
        """Read ``model.json``."""
        return self._read(lambda: ModelSpec.from_json(read_json(self.spec), self.spec))

    def read_info(self) -> dict[str, Any]:
        """Read ``run.json``; empty if there is none."""
        if not self.info.is_file():
            return {}
        from crossx.schema.run import RunFile, check_file

        def read() -> dict[str, Any]:
            values = read_json(self.info)
            check_file(RunFile, values, self.info)
            return values

        return self._read(read)

    def read_config(self) -> dict[str, Any]:
        """Read ``config.yaml``; empty if there is none."""
        return self._read(lambda: read_config(self.config)) if self.config.is_file() else {}

    @property
    def remedy(self) -> str:
        """What to do about a damaged or missing file, as the end of an error; empty without a checkpoint."""
        if self.hub or not (self.last.is_file() or self.previous.is_file()):
            return ""
        return f" `{resume_command(self)}` restores it from a checkpoint."

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except NewerSchemaError:
            raise
        except CrossXError as error:
            raise RunFileError(str(error), self.remedy) from error

    def read_results(self, weights: Path, split: str = "test") -> dict[str, Any]:
        """Read the results of ``crossx test`` on ``split``; empty if it did not test these weights."""
        path = self.path / f"{split}.json"
        if not path.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
            return {}
        results = read_results(path)
        measured = results.get("weights") == os.path.relpath(weights, self.path)
        return results if measured and not self.is_outdated(results) else {}

    def is_outdated(self, results: Mapping[str, Any]) -> bool:
        """Return whether results are those of the model that the run had before it was trained for longer."""
        if results.get("weights") != self.weights.name:
            return False
        info = self.read_info()
        return bool(info.get("extended_after")) and results.get("selection") != info.get("selection")

    def require_results(self, split: str, needed: Sequence[str]) -> dict[str, Any]:
        """Read the results of ``crossx test`` on ``split``, which must be those of the present model.

        Args:
            split: ``test``, ``val`` or ``train``.
            needed: Required keys, see ``read_results`` of ``crossx.runs``.

        Raises:
            CrossXError: If the run was not tested on ``split``, or before it was trained for longer, or the results are
                damaged.
        """
        path, again = self.path / f"{split}.json", f"`{command('test', self.path, '--split', split)}`"
        check_files(path)
        if not path.is_file():
            raise CrossXError(f"{self.path}: not tested on {split} yet: run {again} first.")
        results = read_results(path, needed)
        if self.is_outdated(results):
            raise CrossXError(
                f"{self.path}: {split}.json was measured before the run was trained for longer: test it again with "
                f"{again}."
            )
        return results

    def results_folder(self, output: str | Path | None = None) -> Path:
        """Return the folder for results: ``output``, by default the run folder.

        Raises:
            UsageError: If ``output`` is missing for a model on the Hub.
        """
        if output is None and self.hub:
            words = self.hub.replace("@", " --revision ")
            raise UsageError(
                f"{self.hub}: a model on the Hub has no folder for results. Get it with `hf download {words} "
                "--local-dir DIR`, and name DIR."
            )
        return Path(output) if output is not None else self.path


def resume_command(run: Run, *, restart: bool = False) -> str:
    """Return the command that continues a run, or starts it over."""
    return command("fit", "--resume", run.path, *(["--restart"] if restart else []))


def free_folder(name: str) -> Path:
    """Return the first of ``runs/NAME-1``, ``runs/NAME-2``, ... that does not exist."""
    folders = (Path("runs", f"{name}-{number}") for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def open_run(path: str | Path) -> tuple[Run, Path]:
    """Find a run by its folder, a checkpoint file in it, or its name on the Hugging Face Hub.

    Args:
        path: A folder of ``crossx fit`` or ``crossx share``, a checkpoint file in one, or, if there is no such path,
            ``user/name``, ``user/name@revision`` or ``hf-hub:user/name`` as text.

    Returns:
        The run and the weights to load: the given file, else ``model.safetensors``. Of a run that is not finished, else
        ``best.ckpt``, else ``last.ckpt``, with a warning.

    Raises:
        UsageError: If it is a file of ``crossx export``.
        CrossXError: If there is no such path, no ``model.json`` or no weights, or if a finished run has lost them.
    """
    given = Path(path)
    if not given.exists():
        model = HubModel.parse(path) if isinstance(path, str) else None
        if model is not None:
            run = Run(_downloaded(model), hub=str(model))
            return run, run.weights
        raise CrossXError(f"{given}: no such run folder or checkpoint file.{nearest_run(given)}")
    if given.is_file():
        if given.suffix.lower() in EXPORTED:
            raise UsageError(f"{given}: {PREDICTS_ALONE}")
        for folder in (given.parent, given.parent.parent):
            if (folder / "model.json").is_file():
                if given.suffix.lower() in WITHOUT_WEIGHTS:
                    raise UsageError(
                        f"{given}: a file without weights. Give its run, {folder}, or a checkpoint."
                    )
                return Run(folder), given
        raise CrossXError(
            f"{given}: no model.json next to it or one folder up. A checkpoint must be in its run folder; only "
            "`crossx predict` and `crossx serve` take a file of `crossx export`."
        )
    run = Run(given)
    check_files(run.spec, run.info, run.weights)
    if not run.spec.is_file() and run.remedy:
        raise CrossXError(f"{run.spec}: no such file.{run.remedy}")
    if not run.spec.is_file():
        raise CrossXError(f"{given}: not a run folder (no model.json).{run_around(given)}")
    if run.weights.is_file():
        return run, run.weights
    for weights in (run.best, run.last):
        if weights.is_file():
            _require_unfinished(run, weights)
            return run, weights
    if not (run.info.is_file() or run.config.is_file()):
        raise CrossXError(
            f"{given}: a shared model without its weights ({run.weights.name}): copy or download it again."
        )
    raise CrossXError(
        f"{given}: the run has no weights yet (no model.safetensors, no checkpoints/best.ckpt or last.ckpt): "
        "train it first with `crossx fit`."
    )


def _require_unfinished(run: Run, weights: Path) -> None:
    """Refuse to take a checkpoint for the model of a run that had one, whose epoch may be another."""
    status = run.read_info().get("status")
    if status is not None and status not in COMPLETE:
        _warn_once(run, str(status), weights)
        return
    unknown = "run.json has no status" if run.info.is_file() else "there is no run.json either"
    why = "the run is finished" if status else unknown
    remedy = run.remedy or f" Put back a copy of it, or give {weights}, which may be of another epoch."
    raise RunFileError(f"{run.weights}: no such file, and {why}.", remedy)


@functools.cache
def _warn_once(run: Run, status: str, weights: Path) -> None:
    """Warn once per process, which opens a run several times."""
    log.warning(
        "%s: the run is not finished (%s): these are the weights of %s. `%s` continues it.",
        run.path, status, weights.relative_to(run.path), resume_command(run),
    )  # fmt: skip


def _downloaded(model: HubModel) -> Path:
    try:
        return download_model(model)
    except CrossXError as error:
        near = "" if model.explicit else nearest_run(Path(model.repository))
        raise CrossXError(f"{error}{near}") from error


def find_run(path: Path) -> tuple[Run, Path | None]:
    """Return the run of a folder or a checkpoint, and the checkpoint if ``path`` is one.

    Raises:
        UsageError: If it is neither.
    """
    if not path.is_dir():
        for folder in (path.parent, path.parent.parent):
            run = Run(folder)
            if not (run.config.is_file() or run.checkpoints.is_dir()):
                continue
            if path.suffix == ".ckpt" and path.is_file():
                return run, path
            if path.suffix == ".ckpt" or path.is_file():
                what = "not a checkpoint" if path.is_file() else "no such checkpoint"
                raise UsageError(f"{path}: {what}. `{resume_command(Run(folder))}` takes the newest.")
    run = Run(path)
    if run.config.is_file() or run.checkpoints.is_dir() or run.info.is_file():
        return run, None
    near = "" if path.exists() else nearest_run(path)
    raise UsageError(
        f"{path}: no run to resume (no config.yaml).{near} `{command('fit', '--output', path)}` starts a new one."
    )
