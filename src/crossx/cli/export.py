"""``crossx export RUN --format NAME --output FILE``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from crossx.cli.options import ModelPath, check_folder, check_run
from crossx.cli.values import File, Folder, Name, Positive, Tolerance
from crossx.errors import counted
from crossx.terminal import fold, step

if TYPE_CHECKING:
    from crossx.export.export import ControlledAccuracy, ExportReport
    from crossx.export.recalibration import Recalibration
    from crossx.export.verify import Accuracy, Kept

SHOWN_LAYERS = 8


@dataclass(frozen=True)
class ComparedData:
    """Dataset to compare on.

    Attributes:
        root: The dataset (default: as in training).
        dataset: Name of the dataset (default: as in training).
    """

    root: Folder | None = None
    dataset: Name | None = None


@dataclass(frozen=True)
class Quantization:
    """With --precision int8, which needs the run's data and sets its thresholds of rejection and prediction sets again.

    Attributes:
        calibration: Validation images to take the ranges of the activations from, at least 32 (default: 300).
        accuracy: Images of the test split to measure the accuracy on, at least 32 (default: all).
        max_drop: Percentage points of top-1 accuracy that may be lost on the validation images, such as 0.5: layers
            that cost more stay in float, and if that is not enough no file is left (default: only --tolerance limits
            the loss).
    """

    calibration: Positive | None = None
    accuracy: Positive | None = None
    max_drop: Annotated[Tolerance, "--max-drop"] | None = None


def export(
    run: ModelPath,
    *,
    output: File,
    format: Name | None = None,
    precision: Name = "fp32",
    tolerance: Tolerance | None = None,
    images: Folder | None = None,
    data: ComparedData,
    quantization: Quantization,
) -> None:
    """Write a trained network as one file for other programs (ONNX, OpenVINO, torch.export).

    It takes uint8 images, any number per batch, and returns logits and probabilities. Its metadata hold class names,
    preprocessing and temperature. The file is compared with the network in eager float32 before it gets its name; past
    the tolerance no file is left and the exit code is 1.

    Args:
        output: The file to write.
        format: onnx (.onnx), openvino (.xml and .bin), torch-export (.pt2) or safetensors (only weights, .safetensors);
            by default what FILE's name says.
        precision: fp32, fp16, or for onnx and openvino int8.
        tolerance: Largest difference of the logits from the network's, relative to the largest logit, and of the
            similarities to class means (default: 1e-4; fp16: 0.02); with int8 the loss of top-1
            accuracy that is accepted (default: 0.02).
        images: Folder of images to compare on (default: the run's validation images, or random pixels where its data
            are gone).

    Examples:
        crossx export runs/mine --output mine.onnx
        crossx export runs/mine --format openvino --precision int8 --output mine.xml
        crossx export runs/mine --output mine.xml --precision int8 --max-drop 0.5
        crossx export runs/mine --output mine.pt2 --precision fp16 --images photos/
        crossx predict mine.onnx bird.jpg
    """
    # numpy is not needed for the help
    from crossx.export.options import ExportOptions

    options: dict[str, Any] = {
        "format": format,
        "precision": precision,
        "tolerance": tolerance,
        "images": images,
        "calibration_images": quantization.calibration,
        "accuracy_images": quantization.accuracy,
        "max_drop": quantization.max_drop,
    }
    ExportOptions(Path(output), **options).check()
    check_folder(Path(output).parent)
    check_run(run)

    with step("Loading PyTorch"):
        from crossx.export.export import export_run

    with step("Exporting the network, and comparing the file with it"):
        report = export_run(run, output, root=data.root, dataset=data.dataset, **options)
    _print_report(report)


def _print_report(report: ExportReport) -> None:
    from crossx.export.verify import RANDOM_PIXELS

    model, compared = report.description, report.comparison
    size = model["input"]["size"]
    megabytes = sum(file.stat().st_size for file in report.files) / 1e6
    print(
        fold(
            f"{', '.join(map(str, report.files))}: {model['method']} ({model['backbone']}), {model['format']} "
            f"{model['precision']}, images uint8 (batch, 3, {size}, {size}), {len(model['classes'])} classes, "
            f"{megabytes:.1f} MB",
            hanging="  ",
        )
    )
    tolerance = "" if report.accuracy else f" (tolerance {report.tolerance:.0e})"
    alike = f", kept or rejected alike on {compared.kept.same}" if compared.kept else ""
    print(
        fold(
            f"against eager float32 on {counted(compared.images, 'image')} ({compared.source}): "
            f"{compared.describe()}{tolerance}, same class on {compared.same_class}{alike}",
            hanging="  ",
        )
    )
    if compared.source.startswith(RANDOM_PIXELS):
        print("note: --images DIR compares on real images.", file=sys.stderr)
    _print_thresholds(report.recalibration, report.not_recalibrated)
    if control := report.control:
        _print_control(control)
    if report.accuracy is None:
        _print_moved(compared.kept, model["precision"], again=False)
    else:
        _print_accuracy(report.accuracy, report)


def _print_accuracy(accuracy: Accuracy, report: ExportReport) -> None:
    """Print top-1 and the images kept on the test images, before and after."""
    from crossx.export.options import ROUNDING

    low, high = accuracy.lost
    print(
        fold(
            f"top-1 on {accuracy.images} images ({accuracy.split}): {accuracy.before:.2%} before, "
            f"{accuracy.after:.2%} after, lost {accuracy.before - accuracy.after:.2%} ({low:.2%} to {high:.2%}, "
            f"95% interval; tolerance {report.tolerance:.2%}); same class on {accuracy.same_class} "
            f"({accuracy.agreement.low:.2%} to {accuracy.agreement.high:.2%}); calibrated on "
            f"{accuracy.calibration_images} others",
            hanging="  ",
        )
    )
    if high > report.tolerance:
        print(
            f"note: the loss may be up to {high:.2%}, more than the tolerance; more test images would tell.",
            file=sys.stderr,
        )
    control = report.control
    if control and 100 * (accuracy.before - accuracy.after) > control.max_drop + ROUNDING:
        print(
            f"note: that is more than --max-drop {control.max_drop:g}, which holds for the validation "
            "images; more of them would tell.",
            file=sys.stderr,
        )
    if kept := accuracy.kept:
        low, high = kept.lost
        print(
            fold(
                f"kept by the threshold: {kept.before:.2%} before, {kept.after:.2%} after, lost "
                f"{kept.before - kept.after:.2%} ({low:.2%} to {high:.2%}, 95% interval); kept or rejected "
                f"alike on {kept.same}",
                hanging="  ",
            )
        )
        _print_moved(kept, report.description["precision"], again=report.recalibration is not None)


def _print_thresholds(found: Recalibration | None, not_recalibrated: str | None) -> None:
    """Say which thresholds were set again for int8, or why they were not."""
    if found is not None:
        what = []
        if found.spec.rejection and found.thresholds:
            before, after = found.thresholds
            what.append(f"{found.spec.rejection.score} at least {after:.4g} instead of {before:.4g}")
        if found.spec.sets:
            what.append("prediction sets")
        images = f"{counted(found.images, f'{found.split} image')} of {found.dataset}"
        print(fold(f"thresholds set again for int8 on {images}: {', '.join(what)}", hanging="  "))
    if not_recalibrated is not None:
        print(
            f"note: the thresholds are still those of float32: {not_recalibrated} To set them for int8, calibrate the "
            "run on other images (`crossx calibrate`) and export again.",
            file=sys.stderr,
        )


def _print_moved(kept: Kept | None, precision: str, *, again: bool) -> None:
    """Say that the file keeps another share of the images; ``again`` if its threshold was set again."""
    if kept is None or not kept.moved:
        return
    why = "although its threshold was set again" if again else "since the threshold was set in float32"
    closer = " --precision fp16 is closer." if precision == "int8" else ""
    print(
        f"note: {precision} keeps {kept.after:.2%} of these images instead of {kept.before:.2%}, {why} (McNemar's "
        f"exact test, p = {kept.p_value:.2g}).{closer}",
        file=sys.stderr,
    )


def _print_control(control: ControlledAccuracy) -> None:
    from crossx.errors import counted, first_few

    accuracy, reverted = control.accuracy, control.reverted
    names = f": {first_few(reverted, SHOWN_LAYERS)}" if reverted else ""
    print(
        fold(
            f"top-1 on {accuracy.images} validation images: {accuracy.before:.2%} before, {accuracy.after:.2%} after "
            f"(--max-drop {control.max_drop:g} points); {len(reverted)} of {counted(len(control.layers), 'layer')} "
            f"back in float{names}",
            hanging="  ",
        )
    )
    if control.max_drop * accuracy.images < 100:
        print(
            f"note: one of {accuracy.images} images is {100 / accuracy.images:.2f} points, so --max-drop "
            f"{control.max_drop:g} lets none be lost.",
            file=sys.stderr,
        )
    if control.trained_on:
        print(
            "note: the run was trained on its validation images, too, on which int8 may lose less than on others.",
            file=sys.stderr,
        )
