"""``crossx explain RUN IMAGE_OR_FOLDER... --output DIR``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossx.cli.options import VerbParser, add_device, add_run, positive
from crossx.errors import UsageError, unknown
from crossx.runs import atomic_path, check_writable, open_run

if TYPE_CHECKING:
    from crossx.explain.figures import FigureRow
    from crossx.explain.maps import Explanation
    from crossx.predict.results import ExplainedImage

MAPS = ("activation", "class", "both")
SHEET_ROWS = 20
"""Images a contact sheet."""
SHEET_CELL = 1.1
"""Side of an image on a contact sheet, in inches."""


def run(arguments: Sequence[str]) -> int:
    """Draw where the network looks, a picture an image and contact sheets; 1 where some image could not be read."""
    parser = VerbParser(
        "explain",
        "Draw where a network looks (Fig. 5 of the paper): the activation maps of every part at every stage, and the\n"
        "combined ones, laid over the image as the network saw it. One picture an image, and contact sheets of 20:\n"
        "contact.png, contact-2.png and so on. Where an image's folder has the name of a class, the prediction is\n"
        "said to be right or wrong. An image that cannot be read is named, with the reason, and the exit code is 1.",
        [
            "crossx explain runs/mine bird.jpg --output maps",
            "crossx explain runs/mine photos/ --output maps --maps both --save-maps",
            'crossx explain runs/mine bird.jpg --output maps --maps class --class "Cape May Warbler"',
        ],
    )
    add_run(parser)
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="image files, or folders searched for images"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="new or empty folder for the pictures")
    parser.add_argument(
        "--maps",
        default="activation",
        help="activation (default), of every part; class, what speaks for a class (CAM, or Grad-CAM with "
        "crossx[explain]); or both",
    )
    parser.add_argument(
        "--class", dest="target", metavar="NAME", help="the class of class maps (default: the predicted one)"
    )
    parser.add_argument(
        "--save-maps", action="store_true", help="also write each image's maps as numbers, NAME.npz"
    )
    parser.add_argument(
        "--colormap", metavar="NAME", help="a colormap of matplotlib (default: inferno, safe in grey)"
    )
    parser.add_argument(
        "--opacity", type=_number, default=0.5, metavar="X", help="of the maps, 0 to 1 (default: 0.5)"
    )
    parser.add_argument(
        "--data.batch_size", dest="batch_size", type=positive, default=16, metavar="N", help="images a step"
    )
    add_device(parser)
    return _explain(parser.parse(arguments))


def _explain(options: argparse.Namespace) -> int:
    _check(options)

    from crossx.evaluation.progress import track
    from crossx.predict.inputs import expand_paths
    from crossx.predict.predictor import Predictor

    paths = expand_paths(options.images)
    check_writable(Path(options.output))
    predictor = Predictor.load(options.run, device=options.device)
    explained = track(
        predictor.iter_explain(
            paths, maps=options.maps, target=options.target, batch_size=options.batch_size
        ),
        "Explaining",
        total=len(paths),
    )
    failed = _write(explained, paths, predictor.classes, options)
    done = len(paths) - failed
    if done:
        print(f"{done} images: {Path(options.output) / 'contact.png'}")
    if failed:
        sys.stdout.flush()
        print(f"crossx explain: {failed} of {len(paths)} images cannot be read.", file=sys.stderr)
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded or written."""
    if options.maps not in MAPS:
        raise unknown("--maps", options.maps, MAPS)
    if options.target is not None and options.maps == "activation":
        raise UsageError("--class belongs to class maps: give --maps class or --maps both.")
    if os.path.isdir(options.output) and (names := sorted(os.listdir(options.output))):
        raise UsageError(
            f"{options.output}: holds other files ({names[0]}). Choose a new or an empty folder as --output."
        )

    from crossx.explain.figures import COLORMAP, check_colormap, check_opacity

    options.colormap = options.colormap or COLORMAP
    check_colormap(options.colormap)
    check_opacity(options.opacity)
    spec = open_run(options.run)[0].read_spec()
    if options.target is not None:
        from crossx.predict.predictor import class_number

        class_number(options.target, spec.classes)


def _write(
    explained: Iterable[ExplainedImage],
    paths: Sequence[Path],
    classes: Sequence[str],
    options: argparse.Namespace,
) -> int:
    """Write pictures, maps and contact sheets as the results come; return how many images have none."""
    from crossx.explain.figures import FigureRow, caption

    output = Path(options.output)
    sheets = (output / f"{name}.png" for name in _sheet_names())
    number_of_sheets = -(-len(paths) // SHEET_ROWS)
    names = _file_names(
        paths, taken=[name for name, _ in zip(_sheet_names(), range(number_of_sheets), strict=False)]
    )
    sheet: list[FigureRow] = []
    failed = 0
    for path, name, result in zip(paths, names, explained, strict=True):
        if result.pixels is None or result.explanation is None:
            print(f"crossx explain: {path}: {str(result.error).rstrip('.')}.", file=sys.stderr)
            failed += 1
            continue
        label = path.parent.name if path.parent.name in classes else None
        row = FigureRow(
            result.pixels,
            result.explanation,
            caption(result.explanation, classes, name=path.name, label=label),
        )
        _draw([row], output / f"{name}.png", options)
        if options.save_maps:
            _save_maps(result.explanation, output / f"{name}.npz")
        sheet.append(row)
        if len(sheet) == SHEET_ROWS:
            _draw(sheet, next(sheets), options, SHEET_CELL)
            sheet = []
    if sheet:
        _draw(sheet, next(sheets), options, SHEET_CELL)
    return failed


def _draw(
    rows: Sequence[FigureRow], target: Path, options: argparse.Namespace, cell: float | None = None
) -> None:
    from crossx.explain.figures import CELL, draw
    from crossx.explain.plotting import save_png

    drawn = draw(rows, colormap=options.colormap, opacity=options.opacity, cell=cell or CELL)
    save_png(drawn, target)


def _save_maps(explanation: Explanation, target: Path) -> None:
    import numpy as np

    with atomic_path(target) as temporary, temporary.open("wb") as file:
        boxes = {} if explanation.boxes is None else {"boxes": explanation.boxes}
        np.savez_compressed(file, **explanation.maps, **boxes)  # type: ignore[arg-type]  # no map is called allow_pickle


def _sheet_names() -> Iterator[str]:
    yield "contact"
    number = 1
    while True:
        yield f"contact-{(number := number + 1)}"


def _file_names(paths: Iterable[Path], taken: Iterable[str]) -> list[str]:
    """Name each image's files after it; where a name is taken, after its folder too; where that is, with a number.

    Names that differ in case alone count as the same, as they do on some file systems.
    """
    used = {name.casefold() for name in taken}
    names = []
    for path in paths:
        longer = f"{path.resolve().parent.name}_{path.stem}"
        candidates = [path.stem, longer]
        number = 1
        while (name := candidates.pop(0)).casefold() in used:
            number += 1
            candidates.append(f"{longer}-{number}")
        used.add(name.casefold())
        names.append(name)
    return names


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}") from None
