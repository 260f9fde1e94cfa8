"""``crossx calibrate RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crossx.cli.options import Device, RunPath, Split, TestedData, check_run
from crossx.cli.values import Keep
from crossx.errors import counted
from crossx.runs import Run
from crossx.terminal import fold, step

if TYPE_CHECKING:
    from crossx.evaluation.calibration import Calibration

SHOWN_COVERAGE = 0.9


def calibrate(
    run: RunPath,
    *,
    split: Split = "val",
    keep: Keep = 0.95,
    score: Literal["max_probability", "max_logit", "energy", "similarity", "combined"] | None = None,
    data: TestedData,
    device: Device = "auto",
) -> None:
    """Calibrate probabilities, rejection and prediction sets on validation images.

    The temperature T makes the probabilities softmax(logits / T) say how often a prediction is right. The threshold of
    a score decides which images show none of the classes. Prediction sets hold an image's class with a stated
    probability. All are stored in RUN/model.json. `crossx fit` does this itself where images are held out for
    validation.

    Args:
        run: Run folder.
        split: Images to calibrate on: val or test.
        keep: Share of the images of the classes to keep; 1 gives every image a class.
        score: The score of the threshold; by default combined for a run with class means, else max_logit.

    Examples:
        crossx calibrate runs/mine
        crossx calibrate runs/mine --keep 0.99
        crossx calibrate runs/released --data.dataset folder --data.root my_images
    """
    check_run(run)

    with step("Loading PyTorch"):
        from crossx.evaluation.calibration import calibrate_run

    found = calibrate_run(run, split=split, device=device, score=score, keep=keep, **vars(data))
    described = found.described
    images = f"{counted(described['n'], described['split'] + ' image')} of {described['dataset']}"
    kept = described["temperature_kept"]
    fitted = f"tested on {images}: {kept}" if kept else f"fitted on {images}"
    text = (
        f"temperature {found.temperature:.4g}, {fitted}\n"
        f"  negative log-likelihood  {described['nll']:.4f} before, {described['nll_calibrated']:.4f} after\n"
        f"  calibration error        {described['ece']:.2%} before, {described['ece_calibrated']:.2%} after\n"
        f"rejection  {_rejection(found, keep)}\n"
        f"prediction sets  {_sets(found)}\n"
        f"stored in {Run(Path(run)).spec}"
    )
    print(fold(text, hanging="  "))


def _rejection(found: Calibration, keep: float) -> str:
    if found.rejection is not None:
        from crossx.evaluation.conformal import coverage_interval

        count = found.rejection.images
        low, high = coverage_interval(count, keep)
        return (
            f"of images whose score {found.rejection.score} is below {found.described['threshold']:.4g}, which "
            f"keeps {100 * keep:.4g}% of the images of the classes; between {low:.1%} and {high:.1%} of new ones, "
            f"in 9 of 10 calibrations on {counted(count, 'image')}"
        )
    if keep == 1:
        return "none: every image gets a class"
    from crossx.evaluation.unknowns import images_to_keep

    return (
        f"none: every image gets a class, since to keep {keep:g} needs {images_to_keep(keep)} images or more"
    )


def _sets(found: Calibration) -> str:
    from crossx.evaluation.conformal import PERCENTS, coverage_interval

    assert found.sets is not None
    count = found.sets.images
    # a coverage of 0.5 needs one image
    rows = max(map(len, found.sets.least_probability.values()))
    most = PERCENTS[rows - 1] / 100
    shown = min(SHOWN_COVERAGE, most)
    low, high = coverage_interval(count, shown)
    return (
        f"for a coverage of up to {most:g}; for {shown:g}, it will be between {low:.1%} and {high:.1%} on new images, "
        f"in 9 of 10 calibrations on {counted(count, 'image')}"
    )
