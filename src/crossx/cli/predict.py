"""``crossx predict RUN IMAGES...``."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crossx.cli.options import VerbParser, add_prediction, add_run, positive
from crossx.errors import UsageError

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor
    from crossx.predict.results import Features, Prediction

    Result = TypeVar("Result", Prediction, Features)

FILES = (".csv", ".jsonl", ".parquet")
"""What the name of an --output that is one file ends in."""


def run(arguments: Sequence[str]) -> int:
    """Predict images and write them; 1 where some image could not be read."""
    options = _parser().parse(arguments)
    if options.features is not None:
        return _write_features(options)
    if options.output is not None and _is_folder(options.output):
        return _predict_collection(options)
    for name in ("engine", "workers", "shard_size"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} belongs to a folder of predictions: give --output DIR.")
    return _predict_table(options)


def _parser() -> VerbParser:
    parser = VerbParser(
        "predict",
        "Name what is on images, as a table with the columns path, label, probability, error. An image that cannot\n"
        "be read keeps its row, with the reason, and the exit code is 1.\n\n"
        "The table is printed as CSV, or written to --output FILE.csv, FILE.jsonl or FILE.parquet. With --output DIR\n"
        "it is a folder of Parquet files, for a collection of any size: one folder of images, or one Parquet file (or\n"
        "a folder of them) with image files in a column `path` or encoded images in a column `bytes` or `image`. What\n"
        "is stopped goes on where it was when the same command is given again.\n\n"
        "With --features FILE.parquet it computes feature vectors for retrieval instead.",
        [
            "crossx predict runs/mine bird.jpg",
            "crossx predict runs/mine photos/ more/bird.jpg --output predictions.csv",
            "crossx predict runs/mine 'photos/**/*.jpg' --output predictions.jsonl --top 5",
            "find photos -newer last | crossx predict runs/mine - --output predictions.parquet",
            "crossx predict runs/mine list.csv --flip --crops 5     # averages ten views of an image",
            "crossx predict runs/mine photos/ --features features.parquet",
            "crossx predict runs/mine photos/ --output predictions/",
            "crossx predict runs/mine archive.parquet --engine ray --workers 4 --output predictions/",
        ],
    )
    add_run(parser, exported=True)
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="image files, folders searched for images, patterns as 'photos/**/*.jpg', tables (.csv, .parquet) with a "
        "column `path`, or - for a list of files, one a line, on stdin; for --output DIR one folder or Parquet file",
    )
    written = parser.add_mutually_exclusive_group()
    written.add_argument(
        "--output",
        metavar="FILE|DIR",
        help="file to write, ending in .csv, .jsonl or .parquet, or folder of Parquet files (default: print CSV)",
    )
    written.add_argument(
        "--features",
        metavar="FILE.parquet",
        help="write each image's feature vector, of length 1, in place of predictions",
    )
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="classes an image (default: 1)")
    parser.add_argument(
        "--data.batch_size", dest="batch_size", type=positive, default=16, metavar="N", help="images a step"
    )
    add_prediction(parser)
    collection = parser.add_argument_group("with --output DIR")
    collection.add_argument(
        "--engine",
        help="local, in this process (default), or ray, in several: on this machine, or the cluster of RAY_ADDRESS; "
        "needs crossx[ray]",
    )
    collection.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes of --engine ray (default: one for each GPU, or for each 4 CPU cores)",
    )
    collection.add_argument(
        "--shard_size", type=positive, metavar="N", help="images a Parquet file (default: 256)"
    )
    return parser


def _is_folder(output: str) -> bool:
    """Say whether ``--output`` names a folder of predictions rather than one file.

    Raises:
        UsageError: If it looks like a file of another format.
    """
    suffix = os.path.splitext(output)[1]
    if output.endswith("/") or os.path.isdir(output) or not suffix:
        return True
    if suffix.lower() not in FILES:
        raise UsageError(
            f"--output {output}: a file of predictions ends in {', '.join(FILES)}. For a folder of that name write "
            f"{output}/."
        )
    return False


def _predict_table(options: argparse.Namespace) -> int:
    from crossx.predict.outputs import check_output, print_csv, write_predictions

    output = Path(options.output) if options.output is not None else None
    if output is not None:
        check_output(output, FILES)
    images = _listed(options.images)
    predictions = _load(options).iter_images(images, options.top, options.batch_size)
    if output is not None:
        return _write(
            output, predictions, len(images), lambda path, rows: write_predictions(path, rows, options.top)
        )
    count = Count()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a file name that is no valid UTF-8 is printed as the bytes it is
        sys.stdout.reconfigure(errors="surrogateescape")
    print_csv(sys.stdout, count.through(predictions), options.top)
    return _conclude(count.failed, count.images)


def _write_features(options: argparse.Namespace) -> int:
    from crossx.predict.outputs import check_output, write_features

    if options.top != 1:
        raise UsageError(
            "--top belongs to predictions and does not go with --features: leave one of them out."
        )
    output = Path(options.features)
    check_output(output, (".parquet",))
    images = _listed(options.images)
    predictor = _load(options)
    return _write(
        output,
        predictor.iter_features(images, options.batch_size),
        len(images),
        lambda path, rows: write_features(path, rows, predictor.feature_size),
    )


def _predict_collection(options: argparse.Namespace) -> int:
    if len(options.images) > 1:
        raise UsageError(
            f"--output {options.output} takes one folder or Parquet file, not {len(options.images)} paths. "
            "A table of several goes to --output FILE.csv, FILE.jsonl or FILE.parquet."
        )

    from crossx.evaluation.progress import images_bar
    from crossx.predict.collection import SHARD_SIZE, predict_collection

    with images_bar("Predicting") as (bar, task):
        done = predict_collection(
            options.run,
            options.images[0],
            options.output,
            engine=options.engine or "local",
            workers=options.workers,
            device=options.device,
            top=options.top,
            batch_size=options.batch_size,
            shard_size=options.shard_size or SHARD_SIZE,
            precision=options.precision,
            flip=options.flip,
            crops=options.crops,
            trust=options.trust,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{done.images} images, {done.failed} failed: {options.output}")
    if done.predicted:
        print(f"predicted now: {done.predicted} images, {_pace(done.predicted, done.seconds)}")
    else:
        print("all of them were predicted before")
    return _conclude(done.failed, done.images)


def _listed(given: Sequence[str]) -> list[Path]:
    """Return the image files of the command line, in place of ``-`` those that stdin lists."""
    from crossx.predict.inputs import expand_paths

    files: list[Path] = []
    for word in given:
        if word == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            files.extend(Path(line) for line in lines if line)
        else:
            files.extend(expand_paths([word]))
    return files


def _load(options: argparse.Namespace) -> Predictor:
    from crossx.predict.predictor import Predictor

    return Predictor.load(
        options.run,
        options.device,
        precision=options.precision,
        flip=options.flip,
        crops=options.crops,
        trust=options.trust,
    )


@dataclass
class Count:
    """How many images have gone by, and how many of them could not be read."""

    images: int = 0
    failed: int = 0

    def through(self, results: Iterable[Result]) -> Iterator[Result]:
        """Count results as they come."""
        for result in results:
            self.images += 1
            self.failed += result.error is not None
            yield result


def _write(
    output: Path,
    results: Iterable[Result],
    total: int,
    write: Callable[[Path, Iterator[Result]], None],
) -> int:
    """Write results as they come, show how far it is, and return the exit code."""
    from crossx.evaluation.progress import images_bar

    count, start = Count(), time.perf_counter()
    with images_bar("Predicting", total) as (bar, task):

        def shown() -> Iterator[Result]:
            for result in count.through(results):
                yield result
                bar.advance(task)

        write(output, shown())
    print(f"{count.images} images, {count.failed} failed: {output}")
    print(_pace(count.images, time.perf_counter() - start))
    return _conclude(count.failed, count.images)


def _pace(images: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {images / seconds:.1f} images/s"


def _conclude(failed: int, images: int) -> int:
    """Say that images failed, and return the exit code."""
    if not failed:
        return 0
    sys.stdout.flush()
    print(
        f"crossx predict: {failed} of {images} images cannot be read: see the column error.", file=sys.stderr
    )
    return 1
