"""``crossx explain RUN IMAGE_OR_FOLDER... --output DIR``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from crossx.cli.options import BatchSize, Device, ModelPath, check_run
from crossx.cli.parser import Folder, Fraction, Name
from crossx.errors import UsageError, counted
from crossx.runs import atomic_path, check_writable, open_run

if TYPE_CHECKING:
    from crossx.explain.figures import FigureRow
    from crossx.explain.maps import Explanation
    from crossx.predict.results import ExplainedImage

Kind = Literal["activation", "class", "both"]
"""As ``crossx.explain.maps.Kind``, whose module imports torch."""
SHEET_ROWS = 20
"""Images per contact sheet."""
SHEET_CELL = 1.1
"""Side of an image on a contact sheet, in inches."""


@dataclass(frozen=True)
class Drawing:
    """Pictures.

    Attributes:
        colormap: A colormap of matplotlib (default: inferno, which also works in grey).
        opacity: Opacity of the maps.
        save_maps: Also write the maps of each image as numbers, NAME.npz.
    """

    colormap: Name | None = None
    opacity: Fraction = 0.5
    save_maps: Annotated[bool, "--save-maps"] = False


def explain(
    run: ModelPath,
    images: Sequence[Annotated[str, "IMAGE_OR_FOLDER"]],
    *,
    output: Folder,
    maps: Kind = "activation",
    target: Annotated[str, "--class", "NAME"] | None = None,
    drawing: Drawing,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> int:
    """Draw where a network looks (Fig. 5 of the paper).

    Lays the activation maps of every part at every stage, and the combined ones, over each image as the network saw it.
    Writes one picture per image, and contact sheets of 20: contact.png, contact-2.png and so on. If an image's folder
    has the name of a class, the picture says whether the prediction is right. An image that cannot be read is named,
    with the reason, and the exit code is 1.

    Args:
        images: Image files, or folders searched for images.
        output: New or empty folder for the pictures.
        maps: activation: maps of every part; class: evidence for a class (CAM, or Grad-CAM with crossx[explain]); both.
        target: Class of the class maps (default: the predicted one).

    Examples:
        crossx explain runs/mine bird.jpg --output maps
        crossx explain runs/mine photos/ --output maps --maps both --save-maps
        crossx explain runs/mine bird.jpg --output maps --maps class --class "Cape May Warbler"
    """
    if target is not None and maps == "activation":
        raise UsageError("--class belongs to class maps: give --maps class or --maps both.")
    if os.path.isdir(output) and (names := sorted(os.listdir(output))):
        raise UsageError(
            f"{output}: holds other files ({names[0]}). Choose a new or an empty folder as --output."
        )

    check_run(run)

    from crossx.evaluation.progress import track
    from crossx.explain.overlays import COLORMAP, check_colormap
    from crossx.predict.inputs import expand_paths
    from crossx.predict.predictor import Predictor, class_number

    drawing = replace(drawing, colormap=drawing.colormap or COLORMAP)
    check_colormap(str(drawing.colormap))
    spec = open_run(run)[0].read_spec()
    if target is not None:
        class_number(target, spec.classes)
    paths = expand_paths(images)
    check_writable(Path(output))
    predictor = Predictor.load(run, device=device)
    explained = predictor.iter_explain(paths, maps=maps, target=target, batch_size=batch_size)
    tracked = track(explained, "Explaining", total=len(paths))
    failed = _write(tracked, paths, predictor.classes, Path(output), drawing)
    if done := len(paths) - failed:
        print(f"{counted(done, 'image')}: {Path(output) / 'contact.png'}", flush=True)
    if failed:
        print(f"crossx explain: {failed} of {counted(len(paths), 'image')} cannot be read.", file=sys.stderr)
    return 1 if failed else 0


def _write(
    explained: Iterable[ExplainedImage],
    paths: Sequence[Path],
    classes: Sequence[str],
    output: Path,
    drawing: Drawing,
) -> int:
    """Write pictures, maps and contact sheets as the results come; return how many images have none."""
    from crossx.data.images import printable
    from crossx.data.names import class_name
    from crossx.explain.figures import FigureRow, caption

    number_of_sheets = -(-len(paths) // SHEET_ROWS)
    sheets = ["contact", *(f"contact-{number}" for number in range(2, number_of_sheets + 1))]
    names = _file_names(paths, taken=sheets)
    sheet: list[FigureRow] = []
    failed = 0
    for path, name, result in zip(paths, names, explained, strict=True):
        if result.pixels is None or result.explanation is None:
            print(f"crossx explain: {printable(path)}: {str(result.error).rstrip('.')}.", file=sys.stderr)
            failed += 1
            continue
        label = folder if (folder := class_name(path.parent.name)) in classes else None
        text = caption(
            result.explanation,
            classes,
            name=printable(path.name),
            label=label,
            rejected=result.rejected,
        )
        row = FigureRow(result.pixels, result.explanation, text)
        _draw([row], output / f"{name}.png", drawing)
        if drawing.save_maps:
            _save_maps(result.explanation, output / f"{name}.npz")
        sheet.append(row)
        if len(sheet) == SHEET_ROWS:
            _draw(sheet, output / f"{sheets.pop(0)}.png", drawing, SHEET_CELL)
            sheet = []
    if sheet:
        _draw(sheet, output / f"{sheets.pop(0)}.png", drawing, SHEET_CELL)
    return failed


def _draw(rows: Sequence[FigureRow], target: Path, drawing: Drawing, cell: float | None = None) -> None:
    from crossx.explain.figures import CELL, draw
    from crossx.explain.plotting import save_png

    figure = draw(rows, colormap=str(drawing.colormap), opacity=drawing.opacity, cell=cell or CELL)
    save_png(figure, target)


def _save_maps(explanation: Explanation, target: Path) -> None:
    import numpy as np

    with atomic_path(target) as temporary, temporary.open("wb") as file:
        boxes = {} if explanation.boxes is None else {"boxes": explanation.boxes}
        np.savez_compressed(file, **explanation.maps, **boxes)  # type: ignore[arg-type]  # no map is called allow_pickle


def _file_names(paths: Iterable[Path], taken: Iterable[str]) -> list[str]:
    """Name each image's files after it; if the name is taken, add its folder, then a number.

    Names that differ only in case count as the same, as they do on some file systems.
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
