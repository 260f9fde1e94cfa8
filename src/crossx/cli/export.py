"""``crossx export RUN --format NAME --output FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crossx.cli.options import VerbParser, add_run, positive

if TYPE_CHECKING:
    from crossx.export.export import ExportReport


def run(arguments: Sequence[str]) -> int:
    """Export a run, and print how the file compares with the network."""
    parser = VerbParser(
        "export",
        "Write a trained network as one file for other programs: uint8 images in, logits and probabilities out, any\n"
        "number a batch. Class names, preprocessing and temperature stand in its metadata. The file is compared with\n"
        "the network in eager float32 before it gets its name; past the tolerance no file is left and the exit code\n"
        "is 1.",
        [
            "crossx export runs/mine --output mine.onnx",
            "crossx export runs/mine --format openvino --precision int8 --output mine.xml",
            "crossx export runs/mine --output mine.pt2 --precision fp16 --images photos/",
            "crossx predict mine.onnx bird.jpg",
        ],
    )
    add_run(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="onnx (.onnx), openvino (.xml and .bin), torch-export (.pt2) or safetensors (weights alone, "
        ".safetensors); default: what FILE's name says",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="NAME",
        help="fp32 (default), fp16, or int8 for onnx and openvino",
    )
    parser.add_argument(
        "--tolerance",
        type=_fraction,
        metavar="X",
        help="largest difference of the logits from those of the network, over the largest logit (default: 1e-4; "
        "fp16: 0.02); with int8 the top-1 accuracy that may be lost (default: 0.02)",
    )
    images = parser.add_argument_group("images to compare on")
    images.add_argument(
        "--images",
        metavar="DIR",
        help="a folder of images (default: validation images of the run, or random pixels where its data are gone)",
    )
    images.add_argument("--data.root", dest="root", metavar="DIR", help="the data (default: as in training)")
    images.add_argument(
        "--data.dataset", dest="dataset", metavar="NAME", help="the dataset (default: as in training)"
    )
    int8 = parser.add_argument_group("with --precision int8, which needs the run's data")
    int8.add_argument(
        "--calibration",
        type=positive,
        metavar="N",
        help="validation images that the ranges of the activations are taken from (default: 300)",
    )
    int8.add_argument(
        "--accuracy",
        type=positive,
        metavar="N",
        help="images of the test split to measure the accuracy on (default: all)",
    )
    options = parser.parse(arguments)

    from crossx.export.export import export_run

    report = export_run(
        options.run,
        options.output,
        format=options.format,
        precision=options.precision,
        images=options.images,
        root=options.root,
        dataset=options.dataset,
        tolerance=options.tolerance,
        calibration_images=options.calibration,
        accuracy_images=options.accuracy,
    )
    print_report(report)
    return 0


def print_report(report: ExportReport) -> None:
    """Print what was written and how it compares with the network."""
    from crossx.export.verify import RANDOM_PIXELS

    said, compared = report.description, report.comparison
    size = said["input"]["size"]
    classes = len(said["classes"])
    megabytes = sum(file.stat().st_size for file in report.files) / 1e6
    print(
        f"{', '.join(map(str, report.files))}: {said['method']} ({said['backbone']}), {said['format']} "
        f"{said['precision']}, images uint8 (batch, 3, {size}, {size}), {classes} classes, {megabytes:.1f} MB"
    )
    tolerance = "" if report.accuracy else f" (tolerance {report.tolerance:.0e})"
    print(
        f"against eager float32 on {compared.images} images ({compared.source}): logits differ by at most "
        f"{compared.difference:.1e} of the largest{tolerance}, same class on {compared.same_class}"
    )
    if compared.source.startswith(RANDOM_PIXELS):
        print("note: --images DIR compares on real images.", file=sys.stderr)
    if report.accuracy:
        accuracy = report.accuracy
        print(
            f"top-1 on {accuracy.images} images ({accuracy.split}): {accuracy.before:.2%} before, "
            f"{accuracy.after:.2%} after (tolerance {report.tolerance:.2%}), same class on {accuracy.same_class}; "
            f"calibrated on {accuracy.calibration_images} others"
        )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text!r}")
    return value
