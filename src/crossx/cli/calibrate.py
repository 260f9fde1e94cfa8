"""``crossx calibrate RUN``."""

from __future__ import annotations

from pathlib import Path

from crossx.cli.options import Device, RunPath, Split, TestedData, check_run
from crossx.errors import counted
from crossx.runs import Run
from crossx.terminal import step


def calibrate(run: RunPath, *, split: Split = "val", data: TestedData, device: Device = "auto") -> None:
    """Fit the temperature of a run's probabilities on its validation images.

    The temperature T makes the probabilities softmax(logits / T) say how often a prediction is right. It is stored in
    RUN/model.json; predictions stay, their probabilities change. `crossx fit` does this itself where images are held
    out for validation.

    Args:
        run: Run folder.
        split: Images to fit it on: val or test.

    Examples:
        crossx calibrate runs/mine
        crossx calibrate runs/released --data.dataset folder --data.root my_images
    """
    check_run(run)

    with step("Calibrating the network"):
        from crossx.evaluation.calibration import calibrate_run

        found = calibrate_run(run, split=split, device=device, **vars(data))
    print(
        f"temperature {found['temperature']:.4g}, "
        f"fitted on {counted(found['n'], found['split'] + ' image')} of {found['dataset']}\n"
        f"  negative log-likelihood  {found['nll']:.4f} before, {found['nll_calibrated']:.4f} after\n"
        f"  calibration error        {found['ece']:.2%} before, {found['ece_calibrated']:.2%} after\n"
        f"stored in {Run(Path(run)).spec}"
    )
