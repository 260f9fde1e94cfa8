"""Lengths of time as options give them: ``1h30m``, ``HH:MM:SS``, ``DD:HH:MM:SS``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta

from crossx.errors import UsageError

_NUMBER = r"\d+(?:\.\d+)?"
_UNITS = re.compile(
    r"(?=.)"
    + r"\s*".join(
        f"(?:(?P<{unit}>{_NUMBER})\\s*{unit[0]})?" for unit in ("days", "hours", "minutes", "seconds")
    )
)


def parse_time(given: str | Mapping[str, float], option: str) -> float:
    """Return a length of time in seconds.

    Args:
        given: ``1h30m`` (units d, h, m, s), ``HH:MM:SS``, ``DD:HH:MM:SS``, or arguments of ``timedelta``.
        option: Its name, for the message.

    Raises:
        UsageError: If it cannot be parsed.
    """
    try:
        if isinstance(given, Mapping):
            return timedelta(**given).total_seconds()
        if match := _UNITS.fullmatch(given.strip()):
            parts = {unit: float(number) for unit, number in match.groupdict().items() if number}
            return timedelta(**parts).total_seconds()
        days, hours, minutes, seconds = map(
            int, given.split(":") if given.count(":") == 3 else f"0:{given}".split(":")
        )
        if min(days, hours, minutes, seconds) < 0:
            raise ValueError
        return timedelta(days, seconds, hours=hours, minutes=minutes).total_seconds()
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"{option} takes a time such as 1h30m, HH:MM:SS or DD:HH:MM:SS, or {{hours: 2}}, not {given!r}."
        ) from error
