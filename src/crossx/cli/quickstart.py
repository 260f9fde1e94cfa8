"""``crossx quickstart``: from drawn images to tested networks, with the commands that anyone can type."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossx.cli.values import Folder, Natural
from crossx.commands import command, path_word
from crossx.errors import CrossXError, UsageError
from crossx.runs import Run, free_folder, storage_error
from crossx.terminal import fold_command, page_width, step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECIPE = "quickstart"
METHODS: Mapping[str, Sequence[str]] = {"plain": (), "crossx": ("--model.osme_placement", "output")}
"""Methods with their options. Trained from scratch, gates as in Eq. 2 are better than those of the released code
(docs/results/drawn.md)."""
COLUMNS = 4
EXCITATIONS = "excitations.png"
EXAMPLES = 6
"""Images in that picture, of different classes."""


@dataclass(frozen=True)
class Trained:
    """A trained network's run folder and what ``test_run`` returned."""

    folder: Path
    results: dict[str, Any]


def quickstart(*, output: Folder | None = None, seed: Natural = 0) -> None:
    """Draw images, train on them, test and show the results, in a few minutes.

    The images are birds whose classes differ in one part. A small plain network and the same network with Cross-X are
    trained from scratch and tested on new images.

    Args:
        output: Folder to create (default: the first free runs/quickstart-N).
        seed: Seed of the training.

    Examples:
        crossx quickstart
        crossx quickstart --output runs/first --seed 1
    """
    folder = Path(output) if output else free_folder("quickstart")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: choose another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error

    from crossx.cli.test import compare
    from crossx.evaluation.parts.run import measure_run

    started = time.monotonic()
    trained = {method: train_and_test(method, folder, seed) for method in METHODS}
    picture = folder / "predictions.png"
    draw_predictions(trained["crossx"].folder, picture)
    draw_excitations(trained["crossx"].folder, folder / EXCITATIONS)
    _show(["test", path_word(trained["crossx"].folder), "--parts"])
    with step("Measuring the parts"):
        sentence = measure_run(trained["crossx"].folder)["verdict"]
    against, _ = compare(trained["crossx"].folder, trained["plain"].folder, "test")
    _print_outcome(trained, against, picture, sentence, time.monotonic() - started)


def train_and_test(method: str, output: Path, seed: int = 0) -> Trained:
    """Train one of ``METHODS`` on the drawn images in ``output/images`` as the run ``output/METHOD``, and test it."""
    from crossx.cli.fit import run as fit
    from crossx.evaluation.run import test_run

    folder = output / method
    data = ["--data.root", path_word(output / "images")]
    arguments = ["--config", RECIPE, "--model.method", method, *METHODS[method], *data]
    arguments += ["--seed", str(seed), "--output", path_word(folder)]
    _show(["fit", *arguments])
    fit(arguments)
    return Trained(folder, test_run(folder))


def _show(words: Sequence[str]) -> None:
    print("\n" + fold_command(f"$ {command(*words)}"), flush=True)


def draw_predictions(run_folder: Path, target: Path) -> None:
    """Draw one tested image per class with its prediction, as PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    from crossx.data.images import read_image
    from crossx.explain.plotting import save_png
    from crossx.report.results import RunResults

    tested = RunResults.read(Run(run_folder), "test")
    root = Path(tested.results["data_root"])
    labels, chosen = np.unique(tested.targets, return_index=True)
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 3.2 * rows + 0.5), layout="constrained")
    figure.suptitle(
        f"One new image of each class: {tested.correct.mean():.0%} of all {len(tested.targets)} are right"
    )
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, label, index in zip(grid, labels, chosen, strict=False):
        axes.imshow(read_image(root / str(tested.paths[index])).permute(1, 2, 0).numpy())
        right = bool(tested.correct[index])
        prediction = f"{tested.names[tested.predictions[index]]} ({tested.confidences[index]:.0%})"
        text = prediction if right else f"{prediction}\nit is: {tested.names[label]}"
        wrapped = "\n".join(textwrap.fill(line, 33, break_on_hyphens=False) for line in text.split("\n"))
        axes.set_title(wrapped, fontsize=9, color="#1a7f37" if right else "#c62828")
    for axes in figure.axes:
        axes.set_axis_off()
    save_png(figure, target, dpi=120)


def draw_excitations(run_folder: Path, target: Path) -> None:
    """Draw where each excitation looks on tested images of different classes, as PNG.

    The maps are those of the first stage, the finest. The first row has all excitations, each in its colour
    (``overlay_parts``), the rows below one each.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from crossx.explain.overlays import overlay, overlay_parts, part_colour
    from crossx.explain.plotting import save_png
    from crossx.predict.predictor import Predictor
    from crossx.report.results import RunResults

    tested = RunResults.read(Run(run_folder), "test")
    root = Path(tested.results["data_root"])
    labels, first = np.unique(tested.targets, return_index=True)
    some = np.linspace(0, len(labels) - 1, min(EXAMPLES, len(labels))).round().astype(int)
    paths = [root / str(tested.paths[first[n]]) for n in some]
    pixels, maps = [], []
    for example in Predictor.load(run_folder).iter_explain(paths):
        if example.pixels is None or example.explanation is None:
            raise CrossXError(f"{example.path}: {example.error}")
        pixels.append(example.pixels)
        maps.append(_maps_of_first_stage(example.explanation.maps))
    count = len(maps[0])
    names = ["all", *(f"excitation {number}" for number in range(1, count + 1))]
    figure = Figure(figsize=(1.9 * len(some), 1.9 * len(names) + 0.9), layout="constrained")
    grid = figure.subplots(len(names), len(some), squeeze=False)
    for column, (n, image, of_image) in enumerate(zip(some, pixels, maps, strict=True)):
        pictures = [overlay_parts(image, of_image), *(overlay(image, m) for m in of_image)]
        for axes, picture in zip(grid[:, column], pictures, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
        name = textwrap.fill(tested.names[labels[n]], 26, break_on_hyphens=False)
        grid[0, column].set_title(name, fontsize=8, parse_math=False)
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(name, fontsize=9)
    legend = [Patch(color=part_colour(number), label=name) for number, name in enumerate(names[1:])]
    figure.legend(handles=legend, loc="outside lower center", ncols=count, frameon=False)
    figure.suptitle("What each excitation looks at, on new images")
    save_png(figure, target, dpi=120)


def _maps_of_first_stage(maps: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Stack the maps of the parts of the first stage, (P, h, w); names as in ``Explanation``."""
    import numpy as np

    stage = next(iter(maps)).partition(" part ")[0]
    return np.stack([map_ for name, map_ in maps.items() if name.partition(" part ")[0] == stage])


def _print_outcome(
    trained: dict[str, Trained], against: dict[str, Any], picture: Path, sentence: str, seconds: float
) -> None:
    results = trained["crossx"].results
    print(f"\nTop-1 accuracy on {results['n']} new images of {results['num_classes']} classes:")
    print(f"  chance   {1 / results['num_classes']:7.1%}")
    for method, network in trained.items():
        low, high = network.results["intervals"]["top1"]
        print(f"  {method:<8} {network.results['top1']:7.1%}  ({low:.1%} to {high:.1%}, 95% interval)")
    gain, low, high = (100 * value for value in (against["difference"], *against["interval"]["difference"]))
    print(f"  difference {gain:+.1f} points ({low:+.1f} to {high:+.1f}, on the same images)")
    print(f"\n{textwrap.fill(sentence, min(100, page_width()))}")
    print(f"\nrun      {trained['crossx'].folder}")
    print(f"pictures {picture} and {picture.parent / EXCITATIONS}")
    print(f"time     {seconds // 60:.0f} min {seconds % 60:.0f} s")
    following = command("predict", trained["crossx"].folder, picture.parent / "images", "--top", "3")
    print(fold_command(f"next     {following}"))
