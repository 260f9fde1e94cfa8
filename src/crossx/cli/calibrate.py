"""``crossx calibrate RUN``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossx.cli.options import VerbParser, add_device, add_loading, add_run
from crossx.cli.test import add_data
from crossx.runs import Run


def run(arguments: Sequence[str]) -> int:
    """Fit the temperature of a run, store it with the run, and print what it changes."""
    parser = VerbParser(
        "calibrate",
        "Fit the temperature T with which the probabilities softmax(logits / T) say how often a prediction is right,\n"
        "and store it in RUN/model.json. `crossx fit` does so itself where images are held out for validation; this\n"
        "is for runs made otherwise. Predictions stay, their probabilities change.",
        [
            "crossx calibrate runs/mine",
            "crossx calibrate runs/released --data.dataset folder --data.root my_images",
        ],
    )
    add_run(parser)
    add_data(parser, split="val")
    add_loading(parser)
    add_device(parser)
    options = parser.parse(arguments)

    from crossx.evaluation.calibration import calibrate_run

    found = calibrate_run(
        options.run,
        root=options.root,
        dataset=options.dataset,
        split=options.split,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=options.device,
    )
    print(
        f"temperature {found['temperature']:.4g}, "
        f"fitted on {found['n']} {found['split']} images of {found['dataset']}\n"
        f"  negative log-likelihood  {found['nll']:.4f} before, {found['nll_calibrated']:.4f} after\n"
        f"  calibration error        {found['ece']:.2%} before, {found['ece_calibrated']:.2%} after\n"
        f"stored in {Run(Path(options.run)).spec}"
    )
    return 0
