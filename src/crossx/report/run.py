"""Write the report of a tested run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crossx.commands import command
from crossx.data.fingerprints import UNREADABLE, fingerprint
from crossx.data.geometry import read_view
from crossx.data.index import SPLITS
from crossx.errors import CrossXError, UsageError, unknown
from crossx.evaluation.data import read_data
from crossx.evaluation.examples import ExampleMaps, choose_examples, compute_maps, maps_path
from crossx.evaluation.predictions import relative_paths
from crossx.explain.overlays import outline, overlay
from crossx.report.examples import FindSimilar, Pictures, SimilarTile, similar_tiles, tile_side
from crossx.report.page import render
from crossx.report.results import RunResults
from crossx.runs import Run, check_output_file, open_run, write_text

log = logging.getLogger(__name__)


def report_path(run: str | Path, split: str = "test", output: str | Path | None = None) -> Path:
    """Return the file that ``report_run`` writes, after checking that it can be written.

    Args:
        run: A run folder or a checkpoint file in one.
        split: ``test``, ``val`` or ``train``.
        output: The file; by default ``RUN/SPLIT/report.html``.

    Raises:
        UsageError: If there is no such split, or the file is a folder or does not end in ``.html``.
        CrossXError: If there is no such run, or the file cannot be written.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    path = Path(output) if output is not None else open_run(run)[0].results_folder() / split / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: the report is an HTML page: give --output a name that ends in .html.")
    check_output_file(path)
    return path


def report_run(
    run: str | Path,
    *,
    split: str = "test",
    output: str | Path | None = None,
    device: str = "auto",
    find_similar: FindSimilar | None = None,
) -> Path:
    """Write the report of a run that was tested on ``split``.

    If the images can no longer be read, or are not those that were tested, the page says so and has no pictures.

    Args:
        run: A run folder (its selected weights) or a checkpoint file in one, the one that was tested.
        split: The split that it was tested on.
        output: The file; by default ``RUN/SPLIT/report.html``.
        device: See ``select_device``.
        find_similar: Finds training images for the mistakes of the most confused pairs; None shows none.

    Returns:
        The file.

    Raises:
        UsageError: If there is no such split or device, or the file is a folder or does not end in ``.html``.
        CrossXError: If the run is missing or was not tested, or the file cannot be written.
    """
    target = report_path(run, split, output)
    if device not in ("auto", "cpu"):
        from crossx.evaluation.device import select_device

        select_device(device)
    opened = open_run(run)[0]
    tested = RunResults.read(opened, split)
    shown = choose_examples(tested)
    notices, pictures = [], {}
    similar: dict[int, list[SimilarTile]] = {}
    what = "pictures"
    try:
        files = _find_images(opened, tested, split, shown.images)
        maps = ExampleMaps.load(maps_path(opened.path, split), shown.images, tested)
        if maps is None:
            maps = _compute_maps(run, files, device)
        drawn = _draw(tested, files, maps)
        pictures = dict(zip(shown.images, drawn, strict=True))
        if find_similar is not None:
            what = "similar training images"
            mistakes = list(dict.fromkeys(taken for _, taken, _ in shown.pairs))
            paths = dict(zip(shown.images, files, strict=True))
            found = find_similar([paths[number] for number in mistakes])
            names = dict(zip(tested.classes, tested.names, strict=True))
            similar = {
                number: similar_tiles(images, names) for number, images in zip(mistakes, found, strict=True)
            }
    except CrossXError as error:
        notices.append(f"The page has no {what}: {error}")
        log.warning("the page has no %s: %s", what, error)
    write_text(target, render(tested, shown, pictures, notices, similar))
    return target


def _find_images(run: Run, tested: RunResults, split: str, numbers: Sequence[int]) -> list[Path]:
    """Return the files of tested images, which must still have the contents that were tested."""
    results = tested.results
    config, index = read_data(run, tested.spec, root=results.get("data_root"), dataset=results["dataset"])
    index = index.with_validation(config.val_fraction, config.split_seed)
    paths = relative_paths(index, split, config.root)
    files = dict(zip(paths, (record.path for record in index.split(split)), strict=True))
    found = []
    for number in numbers:
        path = str(tested.paths[number])
        if path not in files:
            raise CrossXError(f"{path} was tested but is no longer in {config.root}.")
        found.append(files[path])
        known = None if tested.contents is None else tested.contents[number]
        # what cannot be read is said when it is drawn
        if known is not None and fingerprint(files[path]) not in (known, UNREADABLE):
            again = command("test", run.path, "--split", split)
            raise CrossXError(
                f"{path} in {config.root} is another image than the one that was tested: test again with `{again}`."
            )
    return found


def _compute_maps(run: str | Path, files: Sequence[Path], device: str) -> ExampleMaps:
    """Compute the maps with the network, for a run that an earlier version of crossx tested."""
    from crossx.data.transforms import Normalize
    from crossx.evaluation.network import TorchNetwork
    from crossx.methods.weights import load_method

    method, spec = load_method(run)
    return compute_maps(TorchNetwork(method, Normalize(spec.preprocessing), device), spec, files)


def _draw(tested: RunResults, files: Sequence[Path], maps: ExampleMaps) -> list[Pictures]:
    """Overlay the activation maps of every stage and part on the images, and draw the method's boxes."""
    prep, tiles = tested.spec.preprocessing, 1 + sum(stage.shape[1] for stage in maps.maps.values())
    side = min(prep.image_size, tile_side(tiles * len(files)))
    pictures = []
    for index, file in enumerate(files):
        image = read_view(file, prep, side)
        overlays = {
            stage: [overlay(image, part) for part in parts[index]] for stage, parts in maps.maps.items()
        }
        if maps.boxes is not None:
            image = outline(image, maps.boxes[index] * np.float32(side / prep.image_size))
        pictures.append(Pictures(image, overlays, maps.boxes is not None))
    return pictures
