"""Caveats of a test's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FINAL_STATUS = ("finished", "imported", None)
"""Status of runs with nothing left to train; None: a folder without run.json."""


def result_notices(results: Mapping[str, Any]) -> list[str]:
    """Return the caveats of a test's results (``SPLIT.json``) as sentences."""
    notices = []
    if results.get("run_status") not in FINAL_STATUS:
        extended = results.get("weights") == "model.safetensors"
        which = (
            "those from before it was trained for longer"
            if extended
            else "the weights of its last checkpoint"
        )
        notices.append(f"The run is not finished ({results['run_status']}): these are {which}.")
    if results.get("seen_in_training"):
        notices.append("These images were trained on: the numbers say nothing about new images.")
    return notices
