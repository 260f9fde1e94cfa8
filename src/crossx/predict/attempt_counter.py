"""Count attempts per shard outside the workers, which may die. Without imports, so that its process is small."""

from __future__ import annotations

from collections import Counter


class AttemptCounter:
    """Counts how often each shard was started."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count an attempt at a shard, and return the number of attempts so far."""
        self._counts[number] += 1
        return self._counts[number]
