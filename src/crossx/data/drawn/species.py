"""Classes of the synthetic dataset, composed from the attributes of parts, and their names."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

from crossx.data.drawn.anatomy import PARTS, PLUMAGES

Attributes: TypeAlias = dict[str, str]
"""Value of ``family`` and of every part."""

_WORDS = {
    "beak": "slender Slender-billed, thick Thick-billed, long Long-billed, yellow Yellow-billed, red Red-billed",
    "crown": (
        "plain Plain-crowned, black Black-capped, red Red-crowned, "
        "white White-crowned, golden Golden-crowned, crested Crested"
    ),
    "face": "plain Plain-faced, masked Masked, browed White-browed, ringed Spectacled",
    "throat": (
        "plain Plain-throated, black Black-throated, white White-throated, "
        "red Ruby-throated, yellow Yellow-throated"
    ),
    "breast": (
        "plain Plain-breasted, spotted Spot-breasted, streaked Streak-breasted, "
        "banded Band-breasted, orange Orange-breasted"
    ),
    "wing": "plain Plain-winged, barred Bar-winged, golden Golden-winged, red Red-shouldered",
    "tail": "plain Plain-tailed, forked Fork-tailed, tipped White-tailed, banded Band-tailed",
    "legs": "pink Pink-legged, orange Orange-legged, black Black-legged, blue Blue-footed",
}
ADJECTIVES: Mapping[str, Mapping[str, str]] = {
    part: dict(word.split(maxsplit=1) for word in words.split(", ")) for part, words in _WORDS.items()
}
"""Part -> value -> the word that the value adds to a class's name."""


def class_attributes(num_classes: int, seed: int = 0) -> list[Attributes]:
    """Return the attributes of each class, ``family`` first, in label order.

    Classes are spread over families of about four. A family starts with one random class; each further class copies a
    random one of the family and changes one part. All classes are different, and each differs from at least one other
    in exactly one part.

    Args:
        num_classes: Number of classes, at least 2 and far below the number of combinations (about 1.5 million).
        seed: Seed of all choices.
    """
    rng = random.Random(f"crossx synthetic classes/{seed}")
    num_families = min(len(PLUMAGES), max(1, num_classes // 4))
    classes: list[Attributes] = []
    for number, family in enumerate(list(PLUMAGES)[:num_families]):
        size = len(range(number, num_classes, num_families))
        members = [{"family": family, **{part: rng.choice(list(ADJECTIVES[part])) for part in PARTS}}]
        known = {tuple(members[0].values())}
        while len(members) < size:
            part = rng.choice(PARTS)
            candidate = {**rng.choice(members), part: rng.choice(list(ADJECTIVES[part]))}
            if tuple(candidate.values()) not in known:
                known.add(tuple(candidate.values()))
                members.append(candidate)
        classes += members
    return classes


def class_names(classes: Sequence[Attributes]) -> list[str]:
    """Name each class by its family and the fewest parts that identify it, such as "Red-crowned Warbler".

    Names are unique: no other class has the same family and the same values of the parts named.
    """
    subsets = [subset for count in range(1, len(PARTS) + 1) for subset in combinations(PARTS, count)]
    counts = {subset: Counter(_values(attributes, subset) for attributes in classes) for subset in subsets}
    names = []
    for attributes in classes:
        telling = (subset for subset in subsets if counts[subset][_values(attributes, subset)] == 1)
        subset = min(telling, key=lambda s: (len(s), sum(attributes[part] == "plain" for part in s)))
        words = [ADJECTIVES[part][attributes[part]] for part in subset]
        names.append(" ".join([*words, attributes["family"].capitalize()]))
    return names


def _values(attributes: Attributes, subset: tuple[str, ...]) -> tuple[str, ...]:
    return (attributes["family"], *(attributes[part] for part in subset))
