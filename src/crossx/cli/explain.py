"""``crossx explain RUN IMAGE_OR_FOLDER... --output DIR``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from crossx.cli.options import BatchSize, Device, ModelPath, check_folder, check_run
from crossx.cli.values import Folder, Fraction, Name
from crossx.errors import UsageError, counted
from crossx.runs import atomic_path, check_writable, open_run
from crossx.terminal import step

if TYPE_CHECKING:
    from crossx.explain.figures import FigureRow
    from crossx.explain.maps import Explanation
    from crossx.predict.results import ExplainedImage
    from crossx.runs import ModelSpec

Kind = Literal["activation", "class", "both"]
"""As ``crossx.explain.maps.Kind``, whose module imports torch."""
SHEET_CELL, SHEET_WIDTH, SHEET_HEIGHT, SHEET_DPI = 1.1, 15.2, 13.4, 120
"""Contact sheets: side of an image and largest page, in inches, and pixels per inch."""


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
    Writes one picture per image, and contact sheets of as many images as fit a page: contact.jpg, contact-2.jpg and so
    on. If an image's folder has the name of a class, the picture says whether the prediction is right. An image that
    cannot be read is named, with the reason, and the exit code is 1.

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
        raise UsageError("--class needs class maps: give --maps class or --maps both.")

    from crossx.data.image_files import is_image_name

    if is_image_name(output):
        raise UsageError(
            f"--output {output}: is the name of a picture. Give a folder, which gets one picture per image."
        )
    if os.path.isdir(output) and (names := sorted(os.listdir(output))):
        raise UsageError(
            f"{output}: holds other files ({names[0]}). Choose a new or an empty folder as --output."
        )

    check_folder(output)
    check_run(run)

    from crossx.evaluation.progress import track
    from crossx.explain.overlays import COLORMAP, check_colormap
    from crossx.predict.inputs import expand_paths

    paths = expand_paths(images)
    with step("Loading PyTorch"):
        from crossx.predict.predictor import Predictor, class_number

    drawing = replace(drawing, colormap=drawing.colormap or COLORMAP)
    check_colormap(str(drawing.colormap))
    spec = open_run(run)[0].read_spec()
    if target is not None:
        class_number(target, spec.classes)
    check_writable(Path(output))
    with step("Loading the network"):
        predictor = Predictor.load(run, device=device)
    explained = predictor.iter_explain(paths, maps=maps, target=target, batch_size=batch_size)
    tracked = track(explained, "Explaining", total=len(paths))
    failed = _write(tracked, paths, predictor.spec, Path(output), drawing)
    if done := len(paths) - failed:
        print(f"{counted(done, 'image')}: {Path(output) / 'contact.jpg'}", flush=True)
    if failed:
        print(f"crossx explain: {failed} of {counted(len(paths), 'image')} cannot be read.", file=sys.stderr)
    return 1 if failed else 0


def _write(
    explained: Iterable[ExplainedImage],
    paths: Sequence[Path],
    spec: ModelSpec,
    output: Path,
    drawing: Drawing,
) -> int:
    """Write pictures, maps and contact sheets as the results come; return how many images have none."""
    from crossx.data.images import printable
    from crossx.data.names import class_name
    from crossx.explain.figures import FigureRow, caption, draw
    from crossx.explain.plotting import save_png

    shown = dict(zip(spec.classes, spec.display_names, strict=True))
    sheets = Sheets(output, len(paths), drawing)
    names = _file_names(paths, taken=sheets.names)
    failed = 0
    for path, name, result in zip(paths, names, explained, strict=True):
        if result.pixels is None or result.explanation is None:
            print(f"crossx explain: {printable(path)}: {str(result.error).rstrip('.')}.", file=sys.stderr)
            failed += 1
            continue
        label = shown.get(class_name(path.parent.name))
        text = caption(
            result.explanation,
            spec.display_names,
            name=printable(path.name),
            label=label,
            rejected=result.rejected,
        )
        row = FigureRow(result.pixels, result.explanation, text)
        save_png(draw([row], colormap=str(drawing.colormap), opacity=drawing.opacity), output / f"{name}.png")
        if drawing.save_maps:
            _save_maps(result.explanation, output / f"{name}.npz")
        sheets.add(row)
    sheets.finish()
    return failed


class Sheets:
    """Contact sheets, written page by page.

    Args:
        output: Their folder.
        images: Number of images to come, of which some may not be added.
        drawing: How maps are drawn.

    Attributes:
        names: Names that the sheets may take, in order.
    """

    def __init__(self, output: Path, images: int, drawing: Drawing) -> None:
        self.names = ["contact", *(f"contact-{number}" for number in range(2, images + 1))]
        self._output, self._images, self._drawing = output, images, drawing
        self._rows: list[FigureRow] = []
        self._across, self._per_page = 1, 0

    def add(self, row: FigureRow) -> None:
        """Add an image; writes the page if it is full."""
        if not self._per_page:
            from crossx.explain.figures import rows_that_fit

            self._across, down = rows_that_fit(row.explanation.maps, SHEET_CELL, SHEET_WIDTH, SHEET_HEIGHT)
            # pages of the same length
            pages = -(-self._images // (self._across * down))
            lines = -(-self._images // (pages * self._across))
            self._per_page = lines * self._across
        self._rows.append(row)
        if len(self._rows) == self._per_page:
            self.finish()

    def finish(self) -> None:
        """Write the last page, if any images are left."""
        if not self._rows:
            return
        from crossx.explain.figures import draw
        from crossx.explain.plotting import save_jpeg

        figure = draw(
            self._rows,
            colormap=str(self._drawing.colormap),
            opacity=self._drawing.opacity,
            cell=SHEET_CELL,
            across=self._across,
        )
        save_jpeg(figure, self._output / f"{self.names.pop(0)}.jpg", SHEET_DPI)
        self._rows = []


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
