"""The options of an export, checked without importing PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crossx.data.image_files import require_images
from crossx.errors import UsageError, unknown
from crossx.extras import require
from crossx.runs import EXPORT_SUFFIXES, check_output_file

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 2e-2}
"""Precision -> tolerance: the largest difference of the logits from eager float32, relative to the largest logit; for
int8 the loss of top-1 accuracy."""
MIN_QUANTIZED = 32
"""Least number of images to calibrate int8 on, and to measure its accuracy on."""
ROUNDING = 1e-6
"""Of differences of accuracies, in percentage points."""


@dataclass(frozen=True)
class Packages:
    """Packages that a format requires.

    Attributes:
        all: For every file.
        int8: Further ones for int8; None if the format has no int8.
        control: Further ones to keep the accuracy of int8.
    """

    all: tuple[str, ...] = ()
    int8: tuple[str, ...] | None = None
    control: tuple[str, ...] = ()


_ONNX = ("onnx", "onnxscript")
PACKAGES: Mapping[str, Packages] = {
    "onnx": Packages((*_ONNX, "onnxruntime"), (), ("nncf",)),
    "openvino": Packages((*_ONNX, "openvino"), ("nncf",)),
    "torch-export": Packages(),
    "safetensors": Packages(),
}
"""Format -> packages."""


@dataclass(frozen=True)
class ExportOptions:
    """What to write; see ``export_run``."""

    output: Path
    format: str | None = None
    precision: str = "fp32"
    tolerance: float | None = None
    images: str | Path | None = None
    calibration_images: int | None = None
    accuracy_images: int | None = None
    max_drop: float | None = None

    def check(self) -> str:
        """Return the name of the format.

        Raises:
            UsageError: If the options do not fit together, or a package is missing.
            CrossXError: If the output cannot be written, or there are no images to compare on.
        """
        name = self._named_format()
        self._check_precision(name)
        if self.precision != "int8" and not (
            self.calibration_images is self.accuracy_images is self.max_drop is None
        ):
            raise UsageError("--calibration, --accuracy and --max-drop require --precision int8.")
        if self.max_drop is not None:
            _check_max_drop(self.max_drop, self.allowed)
        for option, number in (("calibration", self.calibration_images), ("accuracy", self.accuracy_images)):
            if number is not None and number < MIN_QUANTIZED:
                raise UsageError(
                    f"--{option} must be at least {MIN_QUANTIZED}, not {number}: fewer images say too little."
                )
        check_output_file(self.output)
        if self.images is not None:
            require_images(Path(self.images))
        return name

    @property
    def allowed(self) -> float:
        """The tolerance, given or that of ``TOLERANCES``."""
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance

    def _named_format(self) -> str:
        """Return the given format or that of the suffix, which must agree."""
        given, output = self.format, self.output
        if given is not None and given not in EXPORT_SUFFIXES:
            raise unknown("format", given, EXPORT_SUFFIXES)
        named = next(
            (name for name, suffix in EXPORT_SUFFIXES.items() if output.suffix.lower() == suffix), None
        )
        if given is not None and named != given:
            raise UsageError(
                f"--output {output}: a file of --format {given} must end in {EXPORT_SUFFIXES[given]}."
            )
        if named is None:
            endings = ", ".join(f"{suffix} ({name})" for name, suffix in EXPORT_SUFFIXES.items())
            raise UsageError(f"--output {output}: must end in the suffix of a format: {endings}.")
        return named

    def _check_precision(self, name: str) -> None:
        if self.precision not in TOLERANCES:
            raise unknown("precision", self.precision, TOLERANCES)
        needed = PACKAGES[name]
        if self.precision == "int8" and needed.int8 is None:
            offered = ", ".join(other for other, packages in PACKAGES.items() if packages.int8 is not None)
            raise UsageError(f"--format {name} has no int8. Choose from: {offered}.")
        further = (needed.int8 or ()) if self.precision == "int8" else ()
        require(f"--format {name}", *needed.all, *further, extra="export")
        if self.max_drop is not None:
            require("--max-drop", *needed.control, extra="export")


def _check_max_drop(max_drop: float, allowed: float) -> None:
    if not 0 <= max_drop <= 100:
        raise UsageError(f"--max-drop takes percentage points, from 0 to 100, not {max_drop:g}.")
    if max_drop > 100 * allowed + ROUNDING:
        raise UsageError(
            f"--max-drop {max_drop:g} accepts more than --tolerance {allowed:g}, which is {100 * allowed:g} points on "
            f"the test images: give --tolerance {max_drop / 100:g} too, or a lower --max-drop."
        )
