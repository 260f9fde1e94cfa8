"""The run folder: its files, their schema, and writing that a kill cannot corrupt. Imports no torch.

::

    RUN/
      config.yaml               every option of the run, as `crossx fit --config` reads it
      model.json                ModelSpec: what is needed to rebuild the network and to feed it
      model.safetensors         weights of the selected checkpoint
      run.json                  provenance: versions, git state, seed, dataset, how the checkpoint was selected
      metrics.csv metrics.json  training history
      checkpoints/best.ckpt     best on validation; last.ckpt, previous.ckpt: the newest two, for --resume
      checkpoints/SHA256SUMS    checksums of the newest two
      test.json ...             written by `crossx test`
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import reprlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from crossx.errors import CrossXError, UsageError, first_line
from crossx.hub import HubModel, download_model

SCHEMA = 1
EXPORTED = (".onnx", ".xml", ".pt2")
"""How the names of files end that `crossx export` writes, and that are no checkpoints."""
PREDICTS_ALONE = "an exported file is for `crossx predict` and `crossx serve` alone: give the run instead."
MAX_TEXT = 64 << 20
"""Bytes that are read of a JSON or YAML file of a run."""
PACKAGES = ("crossx", "torch", "torchvision", "timm", "lightning", "numpy", "pillow")


@dataclass(frozen=True)
class Preprocessing:
    """How a stored image becomes the network's input in evaluation.

    Attributes:
        image_size: Side of the square crop that the network sees, in pixels.
        resize_size: Size before the crop: one number resizes to a square of that side (the aspect ratio is not
            kept, as in the released code), None resizes the shorter side to image_size / 0.875.
        interpolation: ``bilinear`` or ``bicubic``.
        mean: Per-channel mean, of images scaled to [0, 1].
        std: Per-channel standard deviation, likewise.
        crop_bottom: Rows cut off the bottom first (20 removes FGVC-Aircraft's banner).
        pipeline: ``fast`` or ``strict``, see ``DataConfig``.
    """

    image_size: int
    resize_size: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_bottom: int = 0
    pipeline: str = "fast"


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to rebuild a trained network and to feed it.

    Attributes:
        method: The method's registered name.
        options: The method's own options.
        backbone: The timm model's name.
        backbone_args: Arguments passed to timm beside the name.
        classes: Class names in label order.
        preprocessing: How images are prepared in evaluation.
        dataset: Name of the dataset that the labels come from.
        levels: Hierarchy of the classes, see ``DatasetIndex.levels``.
        temperature: T > 0 of temperature scaling: probabilities are softmax(logits / T). 1 where none was fitted.
    """

    method: str
    options: Mapping[str, Any]
    backbone: str
    backbone_args: Mapping[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    dataset: str
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    temperature: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary that ``from_json`` reads."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> ModelSpec:
        """Rebuild from ``to_json``'s dictionary; ``source`` is named in errors.

        Raises:
            CrossXError: If a value is missing, of the wrong type or out of bounds (see ``crossx.schema``), or the
                schema is newer than this version reads.
        """
        if values.get("schema") != SCHEMA:
            raise CrossXError(
                f"{source}: schema {reprlib.repr(values.get('schema'))}, this version of crossx reads {SCHEMA}: "
                "upgrade crossx."
            )
        # pydantic takes a while to import, and `--help` needs none of it
        from crossx.schema import check_model

        check_model(values, source)
        prep = dict(values["preprocessing"])
        prep["mean"], prep["std"] = tuple(prep["mean"]), tuple(prep["std"])
        return cls(
            method=values["method"],
            options=values["options"],
            backbone=values["backbone"],
            backbone_args=values["backbone_args"],
            classes=tuple(values["classes"]),
            preprocessing=Preprocessing(**prep),
            dataset=values["dataset"],
            levels={name: tuple(groups) for name, groups in values.get("levels", {}).items()},
            temperature=float(values.get("temperature", 1.0)),
        )


@dataclass(frozen=True)
class Run:
    """A run folder. Every path below it is a property, so that no other file spells them.

    Attributes:
        path: The folder.
        hub: The name on the Hub of a model that was downloaded; its folder is the Hub's cache, and is not written to.
    """

    path: Path
    hub: str = ""

    @property
    def config(self) -> Path:  # noqa: D102
        return self.path / "config.yaml"

    @property
    def spec(self) -> Path:  # noqa: D102
        return self.path / "model.json"

    @property
    def weights(self) -> Path:  # noqa: D102
        return self.path / "model.safetensors"

    @property
    def info(self) -> Path:  # noqa: D102
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:  # noqa: D102
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:  # noqa: D102
        return self.checkpoints / "best.ckpt"

    @property
    def last(self) -> Path:  # noqa: D102
        return self.checkpoints / "last.ckpt"

    @property
    def previous(self) -> Path:  # noqa: D102
        return self.checkpoints / "previous.ckpt"

    @property
    def checksums(self) -> Path:  # noqa: D102
        return self.checkpoints / "SHA256SUMS"

    def read_spec(self) -> ModelSpec:
        """Read ``model.json``."""
        return ModelSpec.from_json(read_json(self.spec), self.spec)

    def read_info(self) -> dict[str, Any]:
        """Read ``run.json``, empty where there is none."""
        if not self.info.is_file():
            return {}
        from crossx.schema import RunFile, check_file

        values = read_json(self.info)
        check_file(RunFile, values, self.info)
        return values

    def read_results(self, weights: Path, split: str = "test") -> dict[str, Any]:
        """Read what ``crossx test`` found on ``split``, empty where it did not test these weights."""
        path = self.path / f"{split}.json"
        if not path.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
            return {}
        results = read_results(path)
        return results if results.get("weights") == os.path.relpath(weights, self.path) else {}

    def results_folder(self, output: str | Path | None = None) -> Path:
        """Return the folder for results: ``output``, by default the run folder.

        Raises:
            UsageError: If neither is there to be written to.
        """
        if output is None and self.hub:
            words = self.hub.replace("@", " --revision ")
            raise UsageError(
                f"{self.hub}: a model on the Hub has no folder for results. Get it with `hf download {words} "
                "--local-dir DIR`, and name DIR."
            )
        return Path(output) if output is not None else self.path


def open_run(path: str | Path) -> tuple[Run, Path]:
    """Resolve what a user calls RUN: a run folder, a checkpoint file in one, or a model on the Hugging Face Hub.

    Args:
        path: A folder made by ``crossx fit`` or ``crossx share``, a checkpoint file in one, or, where there is no
            such path, ``user/name``, ``user/name@revision`` or ``hf-hub:user/name`` as text.

    Returns:
        The run and the weights to load: the file given, else ``model.safetensors``, else ``best.ckpt``, else
        ``last.ckpt`` (a run that was stopped before it ended).

    Raises:
        UsageError: If it is a file of ``crossx export``.
        CrossXError: If there is nothing there, no ``model.json`` or no weights.
    """
    given = Path(path)
    if not given.exists():
        model = HubModel.parse(path) if isinstance(path, str) else None
        if model is not None:
            run = Run(download_model(model), hub=str(model))
            return run, run.weights
        raise CrossXError(f"{given}: no such run folder or checkpoint file.")
    if given.is_file():
        if given.suffix.lower() in EXPORTED:
            raise UsageError(f"{given}: {PREDICTS_ALONE}")
        for folder in (given.parent, given.parent.parent):
            if (folder / "model.json").is_file():
                return Run(folder), given
        raise CrossXError(
            f"{given}: there is no model.json beside it or one folder up; a checkpoint is read within its run folder, "
            "and a file of `crossx export` by `crossx predict` and `crossx serve` alone."
        )
    run = Run(given)
    if not run.spec.is_file():
        raise CrossXError(
            f"{given}: not a run folder (no model.json). `crossx fit --output {given}` makes one."
        )
    for weights in (run.weights, run.best, run.last):
        if weights.is_file():
            return run, weights
    raise CrossXError(
        f"{given}: the run has no weights yet (no model.safetensors, no checkpoints/best.ckpt or last.ckpt): "
        "train it first with `crossx fit`."
    )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary file in the same folder that replaces ``path`` when the block ends without an error.

    The data is flushed to disk before the replacement, so that a kill or power cut leaves the old file or the
    new one, never half of one.

    Raises:
        CrossXError: If the disk is full or the folder not writable; the old file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # After writing: a library may have put a file of its own, with other permissions, in its place.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(folder: Path, work: str) -> Iterator[None]:
    """Make a folder, and keep other processes that ask for it out until the block ends.

    Args:
        folder: The folder.
        work: What this process does, as in "another process is WORK".

    Raises:
        CrossXError: If another process is at work in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        # some network file systems know no locks
        with contextlib.suppress(OSError):
            _lock(folder, handle, work)
        yield
    finally:
        os.close(handle)


def _lock(folder: Path, handle: int, work: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CrossXError(
            f"{folder}: another process is {work}. Wait for it, or choose another --output."
        ) from error


def check_writable(folder: Path) -> None:
    """Make a folder and find out whether it can be written to, before hours of work rather than after.

    Raises:
        CrossXError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise storage_error(folder, error) from error


def check_output_file(path: Path) -> None:
    """Check that a file can be written, as ``check_writable`` does its folder.

    Raises:
        UsageError: If a folder has its name.
        CrossXError: If its folder cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the name of a file.")
    check_writable(path.parent)


def storage_error(path: Path, error: OSError) -> CrossXError:
    """Turn an ``OSError`` while writing ``path`` into one line that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CrossXError(
            f"{path}: no space left on the disk. What was written before is intact: free some room."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CrossXError(f"{path}: no permission to write there. Choose another --output.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return CrossXError(f"{path}: a file stands where a folder is needed. Choose another --output.")
    return CrossXError(f"{path}: cannot be written ({error.strerror or error}).")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given; NaN and infinity are refused."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CrossXError: If the file is missing or holds something else.
    """
    try:
        return _read_mapping(path, _parse_json, "JSON", "a JSON object")
    except FileNotFoundError as error:
        raise CrossXError(f"{path}: no such file.") from error
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error


def parse_json(text: str, source: Path) -> dict[str, Any]:
    """Read a JSON object from text; ``source`` is named in errors.

    Raises:
        CrossXError: If the text is something else.
    """
    return _parse_mapping(text, source, _parse_json, "JSON", "a JSON object")


def read_results(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Read what ``crossx test`` wrote.

    Args:
        path: ``SPLIT.json`` of a run.
        needed: Keys that must be there; ``a.b`` is a key within ``a``.

    Raises:
        CrossXError: If the file is missing, lacks a key that is needed, or holds something else.
    """
    from crossx.schema import ResultsFile, check_file, require

    results = read_json(path)
    check_file(ResultsFile, results, path)
    require(results, needed, path)
    return results


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a training history, ``metrics.json``: a row per epoch.

    Raises:
        CrossXError: If the file is missing or holds something else.
    """
    from crossx.schema import HistoryFile, check_file

    values = read_json(path)
    check_file(HistoryFile, values, path)
    rows: list[dict[str, Any]] = values["epochs"]
    return rows


def read_config(path: Path) -> dict[str, Any]:
    """Read a training configuration as YAML holds it.

    Raises:
        CrossXError: If the file cannot be read, or is no YAML mapping.
    """
    import yaml

    what = "a configuration (a mapping with model, data, optim, trainer)"
    try:
        return _read_mapping(path, yaml.safe_load, "YAML", what)
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _read_mapping(path: Path, parse: Callable[[str], Any], language: str, what: str) -> dict[str, Any]:
    if path.stat().st_size > MAX_TEXT:
        raise CrossXError(f"{path}: larger than the {MAX_TEXT >> 20} MiB that are read of such a file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CrossXError(f"{path}: not valid {language} ({first_line(error)}).") from error
    return _parse_mapping(text, path, parse, language, what)


def _parse_mapping(
    text: str, source: Path, parse: Callable[[str], Any], language: str, what: str
) -> dict[str, Any]:
    try:
        values = parse(text)
    except RecursionError as error:
        raise CrossXError(f"{source}: not {what}: its values are nested too deeply.") from error
    # of JSON and YAML, and of numbers with thousands of digits
    except Exception as error:
        raise CrossXError(f"{source}: not valid {language} ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise CrossXError(f"{source}: not {what}.")
    return values


def environment() -> dict[str, Any]:
    """Describe what the run was made with: Python, platform, package versions, git state of the working folder."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes.strip())}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
