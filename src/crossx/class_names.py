"""Names of classes as people read them, and names that only look different. Imports only the standard library."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

_CLASS_IDS = (
    re.compile(r"n[0-9]{8}[-_ ]+"),  # WordNet, as in Stanford Dogs
    re.compile(r"[0-9]+\.\s*(?=[^\W\d_])"),  # CUB-200-2011
)
"""Ids at the start of class names, if every class has one."""
_CLASS_NUMBER = re.compile(r"([0-9]+)[-_ ]+(?=[^\W\d_])")
"""A number that is an id only if the classes are numbered consecutively: not those of ``3_Series``, ``5_Series``."""
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
_LATIN = str.maketrans(
    "асеорхуіјѕһԁԛԝАВЕКМНОРСТХІЈЅҮΑΒΕΖΗΙΚΜΝΟΡΤΥΧοι", "aceopxyijshdqwABEKMHOPCTXIJSYABEZHIKMNOPTYXoi"
)
"""Cyrillic and Greek letters -> the Latin letters that look the same."""
_COPY = re.compile(r"(\s*(\([0-9]{1,2}\)|[-_ ]\s*(copy|copie|kopie|copia)(\s*[0-9]{1,2})?))+$")
"""What a file manager adds to the name of a copy: ``red (1)``, ``red - Copy``."""

_SHOWN = 80


def display_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as people read them: ``Hooded Oriole`` for ``012.Hooded_Oriole``.

    Underscores become spaces. Ids that all names start with are left out: ``012.``, WordNet's ``n02085620-``, and
    numbers that count the classes from 0 or 1. Names that would look the same are kept as they are.

    Args:
        names: The class names, all different, since the ids are found by comparing them.

    Returns:
        One text per name, in their order.
    """
    shown = [
        " ".join(re.split(r"[_\s]+", text)).strip() or name
        for name, text in zip(names, _without_ids(names), strict=True)
    ]
    # a name that is kept may in turn look like another
    while True:
        alike = {text for group in _alike(shown) for text in group}
        kept = [name if text in alike else text for name, text in zip(names, shown, strict=True)]
        if kept == shown:
            return tuple(shown)
        shown = kept


def lookalikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of names that differ, but only in how one text is written.

    The differences: case, blanks and underscores, the form of a number (``1``, ``1.0``, ``01``), invisible and
    full-width characters, letters of another alphabet, and what marks a copy (``red (1)``, ``red - Copy``).
    """
    return [tuple(sorted(group)) for group in _alike(dict.fromkeys(names))]


def naming_problem(names: Iterable[str]) -> str | None:
    """Return why names do not tell classes apart: one is empty or given twice; None if they do."""
    seen: set[str] = set()
    for number, name in enumerate(names):
        if not name.strip(" "):
            return f"class {number} has no name"
        if name in seen:
            return f"{name[:_SHOWN]!r} is given twice"
        seen.add(name)
    return None


def _without_ids(names: Sequence[str]) -> list[str]:
    for pattern in _CLASS_IDS:
        if all(map(pattern.match, names)):
            return [pattern.sub("", name, count=1) for name in names]
    numbered = [_CLASS_NUMBER.match(name) for name in names]
    numbers = sorted(int(match[1]) for match in numbered if match)
    if len(numbers) > 1 and numbers in (list(range(len(names))), list(range(1, len(names) + 1))):
        return [_CLASS_NUMBER.sub("", name, count=1) for name in names]
    return list(names)


def _alike(texts: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for text in texts:
        groups[_appearance(text)].append(text)
    return [group for group in groups.values() if len(group) > 1]


def _appearance(name: str) -> str:
    text = unicodedata.normalize("NFKC", name)
    text = "".join(character for character in text if unicodedata.category(character) not in ("Cf", "Cc"))
    text = "".join(str(unicodedata.decimal(character, character)) for character in text)
    text = _COPY.sub("", text.translate(_LATIN).casefold().strip()) or text
    text = " ".join(re.split(r"[\s_-]+", text))
    if not _NUMBER.fullmatch(text):
        return text
    whole, _, fraction = text.replace(",", ".").partition(".")
    return f"{whole.lstrip('+0') or '0'}.{fraction.rstrip('0')}"
