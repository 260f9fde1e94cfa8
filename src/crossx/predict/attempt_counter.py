"""What workers cannot remember when they die. Imports nothing, so that its process is small and starts at once."""

from __future__ import annotations

from collections import Counter


class AttemptCounter:
    """How often each shard was begun."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count one more attempt at a shard, and return how many there are."""
        self._counts[number] += 1
        return self._counts[number]
