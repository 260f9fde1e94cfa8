"""Write the report of a tested run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crossx.data.index import SPLITS
from crossx.data.transforms import Normalize, batch_images, eval_transform
from crossx.errors import CrossXError, UsageError, unknown
from crossx.evaluation.network import TorchNetwork, within_memory
from crossx.evaluation.predictions import relative_paths
from crossx.evaluation.subject import open_data
from crossx.explain.figures import outline, overlay
from crossx.methods.weights import load_method
from crossx.report.examples import Pictures, choose_examples
from crossx.report.page import render
from crossx.report.results import RunResults
from crossx.runs import check_output_file, open_run, write_text

log = logging.getLogger(__name__)

BATCH_SIZE = 16


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
    run: str | Path, *, split: str = "test", output: str | Path | None = None, device: str = "auto"
) -> Path:
    """Write the report of a run that was tested on ``split``.

    If the images can no longer be read, the page says so and has no pictures.

    Args:
        run: A run folder (its selected weights) or a checkpoint file in one, the one that was tested.
        split: The split that it was tested on.
        output: The file; by default ``RUN/SPLIT/report.html``.
        device: See ``select_device``.

    Returns:
        The file.

    Raises:
        UsageError: If there is no such split or device, or the file is a folder or does not end in ``.html``.
        CrossXError: If the run is missing or was not tested, or the file cannot be written.
    """
    target = report_path(run, split, output)
    tested = RunResults.read(open_run(run)[0], split)
    shown = choose_examples(tested)
    notices = []
    try:
        images = _read_images(tested, split, shown.images)
    except CrossXError as error:
        images = {}
        notices.append(f"The page has no pictures: {error}")
        log.warning("the page has no pictures: %s", error)
    pictures = _pictures(run, images, device) if images else {}
    write_text(target, render(tested, shown, pictures, notices))
    return target


def _read_images(tested: RunResults, split: str, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Return the images as the network sees them, number -> uint8 (3, S, S)."""
    results = tested.results
    data = open_data(tested.info, tested.spec, root=results.get("data_root"), dataset=results["dataset"])
    paths = relative_paths(data.index, split, data.config.root)
    files = dict(zip(paths, (record.path for record in data.index.split(split)), strict=True))
    transform = eval_transform(tested.spec.preprocessing)
    images = {}
    for number in numbers:
        path = str(tested.paths[number])
        if path not in files:
            raise CrossXError(f"{path} was tested but is no longer in {data.config.root}.")
        images[number] = transform(transform.read(files[path]))
    return images


@torch.inference_mode()
def _pictures(run: str | Path, images: Mapping[int, Tensor], device: str) -> dict[int, Pictures]:
    """Overlay the activation maps of every stage and part on the images, and draw the method's boxes."""
    method, spec = load_method(run)
    network = TorchNetwork(method, Normalize(spec.preprocessing), device)
    pictures = {}
    for start in range(0, len(images), BATCH_SIZE):
        numbers = list(images)[start : start + BATCH_SIZE]
        batch = batch_images([images[number] for number in numbers])
        with within_memory(len(batch)):
            inputs = network.inputs(batch)
            maps, boxes = method.activation_maps(inputs), method.boxes(inputs)
        for index, number in enumerate(numbers):
            image = images[number].permute(1, 2, 0).numpy()  # (3, S, S) -> (S, S, 3)
            overlays = {
                stage: [overlay(image, part.float().cpu().numpy()) for part in parts[index]]
                for stage, parts in maps.items()
            }
            if boxes is not None:
                image = outline(image, boxes[index].float().cpu().numpy())
            pictures[number] = Pictures(image, overlays, boxes is not None)
    return pictures
