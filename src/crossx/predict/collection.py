"""Prediction of whole collections into a folder of Parquet files, which can be stopped and continued.

::

    DIR/
      _manifest.json        what the predictions are of: run, weights, collection, options
      part-000000.parquet   the predictions of one shard; there, it is finished

Programs that read a folder of Parquet files as one table pass over a name that begins with an underscore.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from crossx.errors import Stopped, UsageError, unknown
from crossx.predict.cluster import predict_shards
from crossx.predict.exported import exported_files, is_exported, require_trust
from crossx.predict.predictor import Predictor
from crossx.predict.shards import Shard, count_failed, find_collection, predict_shard
from crossx.runs import atomic_path, locked_folder, open_run, read_json, storage_error, write_json

ENGINES = ("local", "ray")
MANIFEST = "_manifest.json"
SHARD_SIZE = 256

_FIXED = {
    "weights": "other weights, or another temperature",
    "collection": "another collection, or one that has changed since",
    "shard_size": "another --shard_size",
    "top": "another --top",
    "flip": "another --flip",
    "crops": "another --crops",
}
# folders begun before there were these options
_DEFAULTS = {"flip": False, "crops": 1}


@dataclass(frozen=True)
class Summary:
    """What a folder of predictions holds now.

    Attributes:
        images: Images of the collection.
        failed: Those that could not be read.
        predicted: Those that this call has predicted, 0 where the folder was finished before.
        seconds: How long this call took.
    """

    images: int
    failed: int
    predicted: int
    seconds: float


def predict_collection(
    run: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    device: str = "auto",
    top: int = 1,
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    precision: str = "auto",
    flip: bool = False,
    crops: int = 1,
    trust: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Predict a collection into a folder, or what a call that was stopped has left of it.

    Args:
        run: A run folder or a checkpoint file in one.
        source: A folder or Parquet file, see ``find_collection``.
        output: The folder to write.
        engine: ``local``, in this process, or ``ray``, in several, see ``cluster``.
        workers: How many processes; ``ray`` alone.
        device: See ``select_device``.
        top: Classes an image, a row each.
        batch_size: Images a step.
        shard_size: Images a file.
        precision: See ``Predictor``.
        flip: See ``Predictor``.
        crops: See ``Predictor``.
        trust: See ``Predictor.load``.
        progress: Called with the images finished and all images.

    Raises:
        Stopped: After Ctrl-C; what was finished is kept.
        UsageError: If an option cannot work, or the folder holds something else.
        CrossXError: If something is missing, damaged or cannot be written.
    """
    start = time.perf_counter()
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if workers is not None and engine != "ray":
        raise UsageError("--workers belongs to --engine ray.")
    if engine == "ray" and is_exported(run):
        raise UsageError(f"{run}: --engine ray takes a run, not an exported file.")
    if is_exported(run):
        require_trust(run, trust)
    folder = Path(output)
    _require_outside(folder, Path(source))
    collection = find_collection(source, shard_size)
    manifest = {
        "crossx": metadata.version("crossx"),
        "run": os.path.abspath(run),
        "source": str(collection.source),
        "images": collection.size,
        "shards": len(collection.shards),
        "weights": _fingerprint(run),
        "collection": collection.fingerprint,
        "shard_size": shard_size,
        "top": top,
        "flip": flip,
        "crops": crops,
    }
    options = {"precision": precision, "flip": flip, "crops": crops}
    with _opened(folder, manifest):
        todo = {n: shard for n, shard in enumerate(collection.shards) if not _part(folder, n).exists()}
        left = sum(shard.size for shard in todo.values())
        done = collection.size - left
        parts = (
            _predict_here(run, todo, device, top, batch_size, {**options, "trust": trust})
            if engine == "local"
            else predict_shards(run, todo, workers, device, top, batch_size, options)
        )
        try:
            progress(done, collection.size)
            with closing(parts):
                for number, part in parts if todo else ():
                    with atomic_path(_part(folder, number)) as temporary:
                        temporary.write_bytes(part)
                    done += todo[number].size
                    progress(done, collection.size)
        except KeyboardInterrupt as signal:
            raise Stopped(
                f"stopped after {done} of {collection.size} images; the same command goes on from there."
            ) from signal
        failed = sum(count_failed(_part(folder, number)) for number in range(len(collection.shards)))
    return Summary(collection.size, failed, left, time.perf_counter() - start)


def _predict_here(
    run: str | Path,
    shards: Mapping[int, Shard],
    device: str,
    top: int,
    batch_size: int,
    options: Mapping[str, Any],
) -> Generator[tuple[int, bytes], None, None]:
    predictor = Predictor.load(run, device, **options)
    for number, shard in shards.items():
        yield number, predict_shard(predictor, shard, top, batch_size)


@contextmanager
def _opened(folder: Path, manifest: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder or go on with it, for this process alone.

    Raises:
        UsageError: If it holds predictions of something else, or no predictions.
        CrossXError: If another process is at work in it, or it cannot be written.
    """
    with locked_folder(folder, "predicting into it"):
        _prepare(folder, manifest)
        yield


def _prepare(folder: Path, manifest: Mapping[str, Any]) -> None:
    path = folder / MANIFEST
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if names and MANIFEST not in names:
        raise UsageError(
            f"{folder}: holds other files ({names[0]}). Choose a new or an empty folder as --output."
        )
    old = {**_DEFAULTS, **read_json(path)} if MANIFEST in names else {}
    differs = [what for key, what in _FIXED.items() if old.get(key) != manifest[key]]
    if differs and len(names) > 1:
        raise UsageError(
            f"{folder}: was begun with {differs[0]}. Give the same to go on, or choose another --output."
        )
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    except OSError as error:
        raise storage_error(folder, error) from error
    if differs:
        write_json(path, manifest)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def _fingerprint(run: str | Path) -> str:
    """Return the SHA-256 of what decides about a prediction: the description of the network and its weights."""
    if is_exported(run):
        files = exported_files(Path(run))
    else:
        found, weights = open_run(run)
        files = [found.spec, weights]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _require_outside(output: Path, source: Path) -> None:
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{output}: lies in the collection itself. Choose an --output outside of {source}.")
