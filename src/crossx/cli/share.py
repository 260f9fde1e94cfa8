"""``crossx share RUN --output DIR | --hub USER/NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossx.cli.options import VerbParser, add_run
from crossx.errors import UsageError
from crossx.runs import PREDICTS_ALONE

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor


def run(arguments: Sequence[str]) -> int:
    """Write a network with its model card into a folder, or upload it."""
    parser = VerbParser(
        "share",
        "Write a trained network into a folder to share, or upload it to the Hugging Face Hub: weights\n"
        "(safetensors), description (JSON) and a model card with the results of `crossx test`, the terms of the\n"
        "training images, intended use, limits and a chart of the accuracy of each class. Where it is loaded,\n"
        "RUN is that folder or USER/NAME.\n\n"
        "The card shows no image of the dataset, whose terms may forbid it; --figure adds activation maps of\n"
        "images that are yours to publish. A folder or repository that was shared before is written anew, an\n"
        "edited README.md too.",
        [
            "crossx share runs/mine --output shared/mine --license apache-2.0",
            "crossx share runs/mine --hub me/my-birds --private",
            "crossx share runs/mine --hub me/my-birds@v2 --figure my_photos/jay.jpg my_photos/wren.jpg",
        ],
    )
    add_run(parser)
    parser.add_argument("--output", metavar="DIR", help="new or empty folder, or that of a shared model")
    parser.add_argument(
        "--hub",
        metavar="USER/NAME",
        help="repository on the Hugging Face Hub, made where it is not there; USER/NAME@BRANCH for another branch. "
        "Log in with `hf auth login` or HF_TOKEN first",
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository visible to its owner alone"
    )
    parser.add_argument(
        "--license", metavar="ID", help="licence of the weights, such as apache-2.0 (default: none is named)"
    )
    parser.add_argument(
        "--figure",
        dest="images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="images of your own to show activation maps of; they are published with the model",
    )
    return _share(parser.parse(arguments))


def _share(options: argparse.Namespace) -> int:
    if bool(options.output) == bool(options.hub):
        raise UsageError("where to? Give either --output DIR or --hub USER/NAME.")
    if options.private and not options.hub:
        raise UsageError("--private belongs to --hub USER/NAME.")

    from crossx.predict.exported import is_exported
    from crossx.predict.predictor import Predictor
    from crossx.share.model_card import check_license
    from crossx.share.sharing import check_target, hub_model, push_to_hub, save_pretrained

    check_license(options.license)
    if is_exported(options.run):
        raise UsageError(f"{options.run}: {PREDICTS_ALONE}")
    model = hub_model(options.hub) if options.hub else None
    if options.output:
        check_target(Path(options.output))
    predictor = Predictor.load(options.run, device="cpu")
    if model is None:
        folder = save_pretrained(predictor, options.output, license=options.license, images=options.images)
        print(f"shared: {folder}")
    else:
        address = push_to_hub(
            predictor,
            model.repository,
            revision=model.revision,
            private=options.private,
            license=options.license,
            images=options.images,
        )
        print(f"shared: {address}")
    _advise(options, predictor)
    return 0


def _advise(options: argparse.Namespace, predictor: Predictor) -> None:
    """Say what the model card lacks and the user can add."""
    sys.stdout.flush()
    if untested := _untested(predictor):
        print(
            f"crossx share: the model card has {untested}: run `crossx test {options.run}` first.",
            file=sys.stderr,
        )
    if options.license is None:
        print("crossx share: the model card names no licence: --license ID names one.", file=sys.stderr)


def _untested(predictor: Predictor) -> str:
    """Say which numbers `crossx test` would add to the card; empty for none, and for a model that it cannot test."""
    if predictor.origin is None or predictor.origin[0].hub:
        return ""
    run, weights = predictor.origin
    results = run.read_results(weights)
    if not results:
        return "no results"
    recalibrated = results.get("temperature", 1.0) != predictor.spec.temperature
    return "no calibration error, since the run was calibrated after its test" if recalibrated else ""
