"""``crossx predict RUN IMAGES...``."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from crossx.cli.options import BatchSize, Inference, PredictorPath, check_run
from crossx.cli.values import Name, Positive
from crossx.errors import UsageError, counted
from crossx.terminal import step

if TYPE_CHECKING:
    from crossx.predict.results import Features, Prediction

    Result = TypeVar("Result", Prediction, Features)

FILES = (".csv", ".jsonl", ".parquet")
"""Suffixes of an --output that is one file."""


@dataclass(frozen=True)
class CollectionOptions:
    """With --output DIR.

    Attributes:
        engine: local, in this process (the default), or ray, in several processes, on this machine or the cluster of
            RAY_ADDRESS; needs crossx[ray].
        workers: Processes of --engine ray (default: one per GPU, or per 4 CPU cores).
        shard_size: Images per Parquet file (default: 256).
    """

    engine: Name | None = None
    workers: Positive | None = None
    shard_size: Positive | None = None


def predict(
    run: PredictorPath,
    images: Sequence[Annotated[str, "IMAGES"]],
    *,
    output: Annotated[str, "FILE|DIR"] | None = None,
    features: Annotated[str, "FILE.parquet"] | None = None,
    top: Annotated[Positive, "K"] = 1,
    batch_size: BatchSize = 16,
    inference: Inference,
    collection: CollectionOptions,
) -> int:
    """Classify images.

    The table has the columns path, label, probability and error. An image that cannot be read keeps its row, with the
    reason, and the exit code is 1. An image below the run's threshold shows none of the classes: its label is empty,
    and the column nearest has the most probable class. --accept all gives every image a class. --coverage 0.9 adds the
    column candidates: classes that have the image's own among them with a probability of 0.9.

    The table is printed as CSV, or written to --output FILE.csv, FILE.jsonl or FILE.parquet. --output DIR writes a
    folder of Parquet files, for a collection of any size: a folder of images, or a Parquet file (or a folder of them)
    with image files in a column `path` or encoded images in a column `bytes` or `image`. If it is stopped, the same
    command continues it.

    With --features FILE.parquet it computes feature vectors for retrieval instead.

    Args:
        images: Image files, folders searched for images, patterns such as 'photos/**/*.jpg', tables (.csv, .parquet)
            with a column `path`, lists (.txt), or - for a list of files on stdin, one per line or as of `find
            -print0`; for --output DIR one folder or Parquet file.
        output: File to write, ending in .csv, .jsonl or .parquet, or folder of Parquet files (default: print CSV).
        features: Write the feature vector of each image, of length 1, instead of predictions.
        top: Classes per image.

    Examples:
        crossx predict runs/mine bird.jpg
        crossx predict runs/mine photos/ more/bird.jpg --output predictions.csv
        crossx predict runs/mine 'photos/**/*.jpg' --output predictions.jsonl --top 5
        find photos -newer last | crossx predict runs/mine - --output predictions.parquet
        crossx predict runs/mine list.csv --flip --crops 5     # averages ten views of an image
        crossx predict runs/mine photos/ --coverage 0.9        # also the classes that it may be
        crossx predict runs/mine photos/ --features features.parquet
        crossx predict runs/mine photos/ --output predictions/
        crossx predict runs/mine archive.parquet --engine ray --workers 4 --output predictions/
    """
    if features is not None and output is not None:
        raise UsageError("--features cannot be combined with --output: leave one of them out.")
    if features is not None:
        inference = _for_features(top, inference)
    if output is not None and _is_folder(output):
        return _predict_collection(run, images, output, top, batch_size, inference, collection)
    for name, value in vars(collection).items():
        if value is not None:
            raise UsageError(f"--{name} needs a folder of predictions: give --output DIR.")

    from crossx.predict import outputs

    target = features or output
    if target is not None:
        suffixes, option = (FILES, "--output") if output else ((".parquet",), "--features")
        outputs.check_output(Path(target), suffixes, option)
    with step("Looking for images"):
        files = _list_files(images)
    check_run(run)

    with step("Loading PyTorch"):
        from crossx.predict.predictor import Predictor

    with step("Loading the network"):
        predictor = Predictor.load(run, **vars(inference))
    if features is not None:
        size = predictor.feature_size
        vectors = predictor.iter_image_features(files, batch_size)
        return _write(
            features, vectors, len(files), lambda path, rows: outputs.write_features(path, rows, size)
        )
    predictions, columns = predictor.iter_images(files, top, batch_size), predictor.columns(top)
    if output is not None:
        return _write(
            output, predictions, len(files), lambda path, rows: outputs.write_predictions(path, rows, columns)
        )
    count = Count()
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("crossx", _escape)
        sys.stdout.reconfigure(errors="crossx")
    outputs.print_csv(sys.stdout, count.through(predictions), columns)
    return _conclude(count.failed, count.images)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Print a file name that is not valid UTF-8 as its bytes, and other characters that stdout lacks as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _for_features(top: int, inference: Inference) -> Inference:
    """Return the options of features, which need no threshold; refuse those of predictions."""
    for name, given in (
        ("--top", top != 1),
        ("--accept", inference.accept != "known"),
        ("--coverage", inference.coverage is not None),
    ):
        if given:
            raise UsageError(
                f"{name} belongs to predictions and cannot be combined with --features: leave one of them out."
            )
    return replace(inference, accept="all")


def _is_folder(output: str) -> bool:
    suffix = os.path.splitext(output)[1]
    if output.endswith("/") or os.path.isdir(output) or not suffix:
        return True
    if suffix.lower() not in FILES:
        raise UsageError(
            f"--output {output}: a file of predictions ends in {', '.join(FILES)}. For a folder of that name write "
            f"{output}/."
        )
    return False


def _predict_collection(
    run: str,
    images: Sequence[str],
    output: str,
    top: int,
    batch_size: int,
    inference: Inference,
    collection: CollectionOptions,
) -> int:
    if len(images) > 1:
        raise UsageError(
            f"--output {output} takes one folder or Parquet file, not {len(images)} paths. "
            "A table of several goes to --output FILE.csv, FILE.jsonl or FILE.parquet."
        )

    from crossx.evaluation.progress import images_bar
    from crossx.predict.collection import SHARD_SIZE, predict_collection

    with images_bar("Predicting") as (bar, task):
        done = predict_collection(
            run,
            images[0],
            output,
            engine=collection.engine or "local",
            workers=collection.workers,
            shard_size=collection.shard_size or SHARD_SIZE,
            top=top,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **vars(inference),
        )
    print(f"{counted(done.images, 'image')}, {done.failed} failed: {output}")
    if done.predicted:
        print(f"predicted now: {counted(done.predicted, 'image')}, {_pace(done.predicted, done.seconds)}")
    else:
        print("all of them were predicted before")
    return _conclude(done.failed, done.images)


def _list_files(images: Sequence[str]) -> list[Path]:
    """Return the image files of the command line, with those that stdin lists in place of ``-``."""
    from crossx.predict.inputs import expand_paths, read_list

    files: list[Path] = []
    for word in images:
        if word == "-":
            files.extend(read_list(sys.stdin.buffer.read(), "standard input"))
        else:
            files.extend(expand_paths([word]))
    return files


@dataclass
class Count:
    """Number of images so far, and of those that could not be read."""

    images: int = 0
    failed: int = 0

    def through(self, results: Iterable[Result]) -> Iterator[Result]:
        """Count results as they pass."""
        for result in results:
            self.images += 1
            self.failed += result.error is not None
            yield result


def _write(
    output: str,
    results: Iterable[Result],
    total: int,
    write: Callable[[Path, Iterator[Result]], None],
) -> int:
    """Write results as they come, show the progress, and return the exit code."""
    from crossx.evaluation.progress import images_bar

    count, start = Count(), time.perf_counter()
    with images_bar("Predicting", total) as (bar, task):

        def shown() -> Iterator[Result]:
            for result in count.through(results):
                yield result
                bar.advance(task)

        write(Path(output), shown())
    print(f"{counted(count.images, 'image')}, {count.failed} failed: {output}")
    print(_pace(count.images, time.perf_counter() - start))
    return _conclude(count.failed, count.images)


def _pace(images: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {images / seconds:.1f} images/s"


def _conclude(failed: int, images: int) -> int:
    """Report the images that failed, and return the exit code."""
    if not failed:
        return 0
    sys.stdout.flush()
    print(
        f"crossx predict: {failed} of {counted(images, 'image')} cannot be read: see the column error.",
        file=sys.stderr,
    )
    return 1
