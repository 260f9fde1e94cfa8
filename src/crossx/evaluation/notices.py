"""Caveats of a test's results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from crossx.runs import COMPLETE

FINAL_STATUS = (*COMPLETE, None)
"""Status of runs with nothing left to train; None: a folder without run.json."""


def result_notices(results: Mapping[str, Any]) -> list[str]:
    """Return the caveats of a test's results (``SPLIT.json``) as sentences."""
    notices = []
    if results.get("run_status") not in FINAL_STATUS:
        extended = results.get("weights") == "model.safetensors"
        which = (
            "those from before it was trained for longer"
            if extended
            else f"those of {results.get('weights') or 'its last checkpoint'}"
        )
        notices.append(f"The run is not finished ({results['run_status']}): these are {which}.")
    seen, images = results.get("seen_images") or 0, results.get("n") or 0
    if results.get("seen_in_training"):
        which = f"{seen} of these {images} images" if 0 < seen < images else "These images"
        notices.append(f"{which} were trained on: the numbers say nothing about new images.")
    elif _calibrated_on(results):
        notices.append(
            "These images were calibrated on: the calibration error with the temperature, the images kept and the "
            "coverage say nothing about new images."
        )
    if seen and not results.get("seen_in_training"):
        were = "was" if seen == 1 else "were"
        notices.append(
            f"{seen} of these {images} images {were} trained on, so that the numbers are too high for new images."
        )
    return notices


def _calibrated_on(results: Mapping[str, Any]) -> bool:
    calibration = results.get("calibration") or {}
    root = results.get("data_root")
    return (
        any(results.get(key) is not None for key in ("ece_calibrated", "rejection", "sets"))
        and all(calibration.get(key) == results.get(key) is not None for key in ("dataset", "split"))
        # runs of before do not say which folder it was
        and os.path.abspath(calibration.get("data_root", root) or "") == os.path.abspath(root or "")
    )
