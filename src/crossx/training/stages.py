"""How long each stage of a training takes, and how long the training waits for images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

WAIT = "waiting for images"
FIRST_WAIT = "waiting for the first images of an epoch"
COPY = "copying and normalising"
FORWARD, BACKWARD, UPDATE = "forward pass and loss", "backward pass", "optimiser step"
VALIDATION, VALIDATION_WAIT = "validation", "waiting for validation images"
FILES = "writing checkpoints and metrics"
OTHER = "everything else"

MIN_SECONDS, MIN_SHARE = 60.0, 0.3
"""An epoch that waits for images is worth a hint if it takes this long, and this share of it is spent waiting."""


class Stages:
    """Divides the time of a training among its stages; every second belongs to one.

    Args:
        wait: Called before the clock is read; waits for what was started on a device.

    Attributes:
        seconds: Stage -> seconds since the start or the resume.
        calls: Stage -> how often it was entered, likewise.
    """

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self._before: Mapping[str, Mapping[str, Any]] = {}
        self._wait = wait
        self.restart()

    def restart(self) -> None:
        """Forget everything but what was before a resume, and start the clock."""
        self.seconds.clear()
        self.calls.clear()
        self._stage, self._since = OTHER, time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the block to ``stage``, and not to the stage around it."""
        outer = self._stage
        self._enter(stage)
        self.calls[stage] += 1
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, stage: str) -> None:
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def to_json(self) -> dict[str, Any]:
        """Return the total and each stage, the longest first, with what was before a resume."""
        measured = self.state_dict()
        ordered = sorted(measured["seconds"].items(), key=lambda item: -item[1])
        stages = [
            {"stage": stage, "seconds": value, "times": measured["times"].get(stage, 0)}
            for stage, value in ordered
        ]
        return {"seconds": sum(measured["seconds"].values()), "stages": stages}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return seconds and times of each stage, with what was before a resume, for the checkpoints."""
        self._enter(self._stage)
        own: dict[str, dict[str, Any]] = {"seconds": self.seconds, "times": self.calls}
        return {kind: _summed(values, self._before.get(kind, {})) for kind, values in own.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue the measurement of a checkpoint."""
        self._before = state

    def waited(self) -> float | None:
        """Return the share of the time of training steps that was spent waiting, None if too little was measured.

        Waiting for the first images of an epoch, which includes the start of the workers, does not count.
        """
        steps = sum(self.seconds.get(stage, 0.0) for stage in (WAIT, COPY, FORWARD, BACKWARD, UPDATE))
        share = self.seconds.get(WAIT, 0.0) / steps if steps else 0.0
        return share if steps >= MIN_SECONDS and share >= MIN_SHARE else None


def profile_table(profile: Mapping[str, Any]) -> list[str]:
    """Format what ``Stages.to_json`` returned as lines of a table."""
    total = profile["seconds"]
    lines = [f"{'stage':<41}{'seconds':>9}{'share':>8}{'times':>7}{'ms each':>9}"]
    for row in profile["stages"]:
        seconds, times = row["seconds"], row["times"]
        each = f"{1000 * seconds / times:>9.1f}" if times else ""
        lines.append(
            f"{row['stage']:<41}{seconds:>9.2f}{seconds / max(total, 1e-9):>8.1%}{times or '':>7}{each}"
        )
    lines.append(f"{'all':<41}{total:>9.2f}")
    return [line.rstrip() for line in lines]


def _summed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}
