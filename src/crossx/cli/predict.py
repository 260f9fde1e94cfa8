"""``crossx predict RUN IMAGE_OR_FOLDER...``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from crossx.cli.options import VerbParser, add_device, add_run, positive
from crossx.errors import UsageError


def run(arguments: Sequence[str]) -> int:
    """Predict images and write a table; 1 where some image could not be read."""
    parser = VerbParser(
        "predict",
        "Name what is on images, as a table with the columns path, label, probability, error. An image that cannot\n"
        "be read keeps its row, with the reason, and the exit code is 1.\n\n"
        "The table is printed, or written to --output FILE.csv. With --output DIR, any other name, it is a folder of\n"
        "Parquet files, for a collection of any size: one folder of images, or one Parquet file (or a folder of them)\n"
        "with image files in a column `path` or encoded images in a column `bytes` or `image`. What is stopped\n"
        "goes on where it was when the same command is given again.",
        [
            "crossx predict runs/mine bird.jpg",
            "crossx predict runs/mine photos/ more/bird.jpg --output predictions.csv",
            "crossx predict runs/mine bird.jpg --top 5       # one row a rank",
            "crossx predict runs/mine photos/ --output predictions/",
            "crossx predict runs/mine archive.parquet --engine ray --workers 4 --output predictions/",
        ],
    )
    add_run(parser)
    parser.add_argument(
        "images",
        metavar="IMAGE_OR_FOLDER",
        nargs="+",
        help="image files, or folders searched for images; for --output DIR one folder or Parquet file",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.csv|DIR",
        help="CSV file, or folder of Parquet files, to write (default: print)",
    )
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="classes an image (default: 1)")
    parser.add_argument(
        "--data.batch_size", dest="batch_size", type=positive, default=16, metavar="N", help="images a step"
    )
    add_device(parser)
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
    options = parser.parse(arguments)
    if options.output and not options.output.lower().endswith(".csv"):
        return _predict_collection(options)
    for name in ("engine", "workers", "shard_size"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} belongs to a folder of predictions: give --output DIR.")
    return _predict_table(options)


def _predict_table(options: argparse.Namespace) -> int:
    from crossx.deploy.predictor import Predictor, expand_paths, write_csv

    images = expand_paths(options.images)
    predictor = Predictor.load(options.run, device=options.device)
    predictions = predictor.predict(images, top=options.top, batch_size=options.batch_size)
    if options.output:
        write_csv(Path(options.output), predictions, options.top)
        print(f"{len(predictions)} images: {options.output}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "predictions.csv"
            write_csv(table, predictions, options.top)
            sys.stdout.write(table.read_text(encoding="utf-8"))
    failed = sum(prediction.error is not None for prediction in predictions)
    return _conclude(failed, len(predictions))


def _predict_collection(options: argparse.Namespace) -> int:
    if len(options.images) > 1:
        raise UsageError(
            f"--output {options.output} takes one folder or Parquet file, not {len(options.images)} paths. "
            "A table of several goes to --output FILE.csv."
        )

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from crossx.deploy.collection import SHARD_SIZE, predict_collection

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Predicting", total=None)
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
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{done.images} images, {done.failed} failed: {options.output}")
    if done.predicted:
        pace = f"{done.seconds:.1f} s, {done.predicted / done.seconds:.1f} images/s"
        print(f"predicted now: {done.predicted} images, {pace}")
    else:
        print("all of them were predicted before")
    return _conclude(done.failed, done.images)


def _conclude(failed: int, images: int) -> int:
    """Say that images failed, and return the exit code."""
    if not failed:
        return 0
    sys.stdout.flush()
    print(
        f"crossx predict: {failed} of {images} images cannot be read: see the column error.", file=sys.stderr
    )
    return 1
