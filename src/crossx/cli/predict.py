"""``crossx predict RUN IMAGE_OR_FOLDER...``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from crossx.cli.options import VerbParser, add_device, add_run, positive


def run(arguments: Sequence[str]) -> int:
    """Predict images and write a table; 1 where some image could not be read."""
    parser = VerbParser(
        "predict",
        "Name what is on images, as a table with the columns path, label, probability, error. An image that cannot\n"
        "be read keeps its row, with the reason, and the exit code is 1.",
        [
            "crossx predict runs/mine bird.jpg",
            "crossx predict runs/mine photos/ more/bird.jpg --output predictions.csv",
            "crossx predict runs/mine bird.jpg --top 5       # one row a rank",
        ],
    )
    add_run(parser)
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="image files, or folders searched for images"
    )
    parser.add_argument("--output", metavar="FILE", help="CSV file to write (default: print it)")
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="classes an image (default: 1)")
    parser.add_argument(
        "--data.batch_size", dest="batch_size", type=positive, default=16, metavar="N", help="images a step"
    )
    add_device(parser)
    options = parser.parse(arguments)

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
    failed = [prediction for prediction in predictions if prediction.error is not None]
    if failed:
        sys.stdout.flush()
        print(
            f"crossx predict: {len(failed)} of {len(predictions)} images cannot be read: see the column error.",
            file=sys.stderr,
        )
    return 1 if failed else 0
