"""Predict a whole collection into a folder of Parquet files, resumably.

::

    DIR/
      _manifest.json        run, weights, collection and options
      part-000000.parquet   predictions of one finished shard

Programs that read a folder of Parquet files as one table ignore names with a leading underscore.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Unpack

from crossx.errors import Stopped, UsageError, counted, unknown
from crossx.extras import require
from crossx.predict.checksums import exported_files
from crossx.predict.cluster import predict_shards
from crossx.predict.exported import is_exported, require_trust
from crossx.predict.predictor import Predictor, PredictorOptions
from crossx.predict.shards import Shard, count_failed, find_collection, predict_shard
from crossx.runs import (
    atomic_path,
    file_checksum,
    locked_folder,
    open_run,
    read_json,
    storage_error,
    write_json,
)

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
    "accept": "another --accept",
    "coverage": "another --coverage",
}
# also for folders from before these options existed
_DEFAULTS = {"flip": False, "crops": 1, "accept": "known", "coverage": None}


@dataclass(frozen=True)
class Summary:
    """Summary of a folder of predictions.

    Attributes:
        images: Images of the collection.
        failed: Images that could not be read.
        predicted: Images predicted by this call.
        seconds: Duration of this call.
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
    trust: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[PredictorOptions],
) -> Summary:
    """Predict a collection into a folder, resuming a stopped call.

    Args:
        run: A run folder or a checkpoint file in one.
        source: A folder or Parquet file, see ``find_collection``.
        output: The folder to write.
        engine: ``local``, in this process, or ``ray``, in several, see ``cluster``.
        workers: Number of processes, only with ``ray``.
        device: See ``select_device``.
        top: Classes per image, one row each.
        batch_size: Images per batch.
        shard_size: Images per file.
        precision: See ``Predictor.load``.
        trust: See ``Predictor.load``.
        progress: Called with the number of finished and of all images.
        **options: See ``PredictorOptions``.

    Raises:
        Stopped: After Ctrl-C; finished shards are kept.
        UsageError: If an option is not possible, pyarrow is not installed, or the folder holds other files.
        CrossXError: If something is missing, damaged or cannot be written.
    """
    start = time.perf_counter()
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    require("a folder of predictions", "pyarrow", extra="parquet")
    if workers is not None and engine != "ray":
        raise UsageError("--workers requires --engine ray.")
    if engine == "ray" and is_exported(run):
        raise UsageError(f"{run}: --engine ray takes a run, not an exported file.")
    if is_exported(run):
        require_trust(run, trust)
    folder = Path(output)
    _require_outside(folder, Path(source))
    collection = find_collection(source, shard_size)
    checksums = _checksums(run)
    manifest = {
        "crossx": metadata.version("crossx"),
        "run": os.path.abspath(run),
        "source": str(collection.source),
        "images": collection.size,
        "shards": len(collection.shards),
        "files": checksums,
        "weights": hashlib.sha256(b"".join(map(bytes.fromhex, checksums.values()))).hexdigest(),
        "collection": collection.fingerprint,
        "shard_size": shard_size,
        "top": top,
        **{name: options.get(name, default) for name, default in _DEFAULTS.items()},
    }
    loading = {"precision": precision, **options}
    with locked_folder(folder, "predicting into it"):
        _prepare(folder, manifest)
        todo = {n: shard for n, shard in enumerate(collection.shards) if not _part(folder, n).exists()}
        left = sum(shard.size for shard in todo.values())
        done = collection.size - left
        parts = (
            _predict_here(run, todo, device, top, batch_size, {**loading, "trust": trust})
            if engine == "local"
            else predict_shards(run, todo, workers, device, top, batch_size, loading)
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
                f"stopped after {done} of {counted(collection.size, 'image')}; run the same command to continue."
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
            f"{folder}: was started with {differs[0]}. Give the same to continue, or choose another --output."
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


def _checksums(run: str | Path) -> dict[str, str]:
    """Return the SHA-256 of the files with the network's description and weights, by name."""
    if is_exported(run):
        files = exported_files(Path(run))
    else:
        found, weights = open_run(run)
        files = [found.spec, weights]
    return {path.name: file_checksum(path) for path in files}


def _require_outside(output: Path, source: Path) -> None:
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{output}: is inside the collection. Choose an --output outside {source}.")
