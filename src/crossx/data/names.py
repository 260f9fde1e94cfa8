"""Names of classes and splits as people write them: one text per class, and what only looks the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from crossx.class_names import lookalikes as lookalikes
from crossx.errors import first_few

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSING = frozenset({"nan", "none", "null", "n/a", "na", "<na>", "nat", "#n/a", "undefined"})
_SHOWN = 5

_SPLITS: Mapping[str, str] = {
    word: split
    for split, words in {
        "train": "train training trn trainval trainvalid",
        "val": "val valid validation validate validating dev devel development",
        "test": "test testing tst tests",
        # some call the validation images so, others the test images
        "unclear": "eval evaluation evaluate evaluating holdout heldout",
    }.items()
    for word in words.split()
}
_SHORT: Mapping[str, str] = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
_FILLERS = frozenset(
    {
        "set",
        "sets",
        "data",
        "dataset",
        "datasets",
        "split",
        "splits",
        "partition",
        "subset",
        "part",
        "folder",
        "dir",
    }
    | {
        "images",
        "image",
        "imgs",
        "img",
        "pics",
        "pictures",
        "photos",
        "samples",
        "examples",
        "files",
        "crops",
    }
)
_COMPOUNDS: Mapping[str, str] = {
    compound: split
    for word, split in _SPLITS.items()
    for compound in (
        word,
        f"x{word}",
        *(word + filler for filler in _FILLERS),
        *(filler + word for filler in _FILLERS),
    )
}


def class_name(text: str) -> str:
    """Return a class's name: in Unicode's composed form (NFC), without blanks or invisible characters around it.

    Bytes that are not UTF-8 (as in the name of a folder from an old archive) become escapes, ``caf\\xe9``.
    """
    escaped = _SURROGATE.sub(_escaped, text)
    return unicodedata.normalize("NFC", escaped.strip(_INVISIBLE).strip().strip(_INVISIBLE).strip())


def quoted(names: Sequence[str]) -> list[str]:
    """Quote names so that they can be told apart: with escapes if they look the same."""
    alike = {name for group in lookalikes(names) for name in group}
    return [ascii(name) if name in alike else repr(name) for name in names]


def lookalike_note(names: Sequence[str]) -> list[str]:
    """Return the note on classes whose names look the same, none if there are none."""
    groups = [" and ".join(quoted(group)) for group in lookalikes(names)]
    if not groups:
        return []
    return [
        f"classes whose names look the same are kept apart: {first_few(groups, _SHOWN, '; ')}. Rename them if they "
        "are one class"
    ]


def class_notes(names: Sequence[str]) -> list[str]:
    """Return the notes on classes' names that may be mistakes."""
    return [*lookalike_note(names), *several_labels_note(names), *missing_label_note(names)]


def missing_label_note(names: Sequence[str]) -> list[str]:
    """Return the note on names that programs write for a missing label (``NaN``), none if there are none."""
    missing = [repr(name) for name in names if name.casefold() in _MISSING]
    if not missing:
        return []
    return [
        f"{', '.join(missing)} read as {'a class' if len(missing) == 1 else 'classes'}: if it stands for a missing "
        "label, remove those images"
    ]


def several_labels_note(names: Sequence[str]) -> list[str]:
    """Return the note on names that look like several labels (``daisy|white``), none if there are none."""
    known = set(names)
    several = [
        repr(name)
        for name in names
        if "|" in name
        or re.fullmatch(r"[\[({].*[,;].*[\])}]", name)
        or any(
            len(parts) > 1 and all(part in known for part in parts)
            for parts in (re.split(rf"\s*{mark}\s*", name) for mark in (",", ";", "/", r"\+", "&"))
        )
    ]
    if not several:
        return []
    what = (
        "name that looks like several labels is"
        if len(several) == 1
        else "names that look like several labels are each"
    )
    return [f"{len(several)} {what} one class, since an image has one label: {first_few(several, _SHOWN)}"]


def words_of(name: str) -> list[str]:
    """Return the words of a name without case, numbers and separators: ``val, images`` of ``val_Images2``."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", spaced)]


def split_name(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a folder or value is named after, and the name's other words.

    Case, numbers, separators and words such as ``set``, ``data`` and ``images`` make no difference: ``Training_Set``,
    ``test2017``, ``valImages``. The split is ``train``, ``val``, ``test``, ``unclear`` (``eval``, ``holdout``) or None.
    """
    words = words_of(name)
    for whole in ("".join(words), "".join(word for word in words if word not in _FILLERS)):
        if whole in _COMPOUNDS:
            return _COMPOUNDS[whole], ()
    found = {_COMPOUNDS[word] for word in words if word in _COMPOUNDS}
    if len(found) != 1:
        return None, tuple(words)
    return found.pop(), tuple(word for word in words if word not in _COMPOUNDS)


def short_split_name(name: str) -> str | None:
    """Return the split of an abbreviation that can also be another word: ``tr``, ``te``, ``va``."""
    return _SHORT.get(name.strip().casefold())


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
