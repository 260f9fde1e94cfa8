"""NABirds (Van Horn et al., CVPR 2015), https://dl.allaboutbirds.org/nabirds, in CUB's layout plus a hierarchy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from crossx.data.index import DatasetIndex
from crossx.data.readers.cub import read_classes, read_records
from crossx.data.readers.parsing import archive_root, distinct_names, keyed, read_rows
from crossx.errors import CrossXError


def read_nabirds(root: Path) -> DatasetIndex:
    """Read NABirds, or a part of it, from the unpacked ``nabirds.tar.gz``.

    The archive is a tree of 1011 nodes. The classes are its 555 leaves, the nodes that images are labelled with,
    ordered by node id, as the folders in ``images/`` are; the archive itself has no consecutive labels. A class is
    named as in ``classes.txt`` (``Oak Titmouse``, ``Common Eider (Adult male)``); names that occur more than once
    get the node id in parentheses. Boxes and visible keypoints are read where present; ``sizes.txt`` and
    ``photographers.txt`` are not read.

    ``levels`` holds the tree (in parentheses, the number of groups in the whole archive):

    - ``order``: the ancestor directly below the root (22);
    - ``family``: the parent of the species, which is the order itself outside the perching birds (50);
    - ``species``: the parent of the leaf (404).

    Args:
        root: The folder ``nabirds``, or the folder that contains it.

    Raises:
        CrossXError: If a file or ``images/`` is missing, a line is malformed, the lists disagree, or the hierarchy
            is not a tree.
    """
    root = archive_root(root, "classes.txt", "nabirds")
    names = read_classes(root)
    parents = _read_parents(root / "hierarchy.txt", names)
    leaves = sorted(parents.keys() - set(parents.values()))
    labels = {leaf: label for label, leaf in enumerate(leaves)}
    records, notes = read_records(root, labels, "is not a leaf of classes.txt and hierarchy.txt")
    return DatasetIndex(
        name="nabirds",
        classes=_names(leaves, names),
        records=records,
        notes=notes,
        levels=_levels([_below_root(leaf, parents) for leaf in leaves], names),
    )


def _read_parents(path: Path, names: Mapping[int, str]) -> dict[int, int]:
    """Return class id -> parent id for every class except the root; the classes must form one tree."""
    parents: dict[int, int] = {}
    for row in keyed(read_rows(path, ("class id", "parent id"))).values():
        child, parent = row.integer(0, "the class id"), row.integer(1, "the parent id")
        for class_id in (child, parent):
            if class_id not in names:
                raise row.error(f"class id {class_id} is not in classes.txt")
        parents[child] = parent
    for child in parents:
        ancestor, steps = child, 0  # a walk with more steps than the tree has nodes is a circle
        while ancestor in parents and steps <= len(parents):
            ancestor, steps = parents[ancestor], steps + 1
        if ancestor in parents:
            raise CrossXError(f"{path}: class id {child} is its own ancestor. Unpack the archive again.")
    roots = sorted(names.keys() - parents.keys())
    if len(roots) != 1:
        shown = ", ".join(map(str, roots[:5])) + (", ..." if len(roots) > 5 else "")
        raise CrossXError(
            f"{path}: {len(roots)} classes have no parent ({shown}), expected one root. Unpack the archive again."
        )
    return parents


def _below_root(leaf: int, parents: Mapping[int, int]) -> list[int]:
    """Return the path to ``leaf``, from directly below the root."""
    path = [leaf]
    while parents[path[-1]] in parents:
        path.append(parents[path[-1]])
    return path[::-1]


def _levels(paths: Sequence[Sequence[int]], names: Mapping[int, str]) -> dict[str, tuple[str, ...]]:
    """Return level -> name of each leaf's group, given the leaves' paths."""
    groups = {
        "order": [path[0] for path in paths],
        "family": [path[max(0, len(path) - 3)] for path in paths],
        "species": [path[max(0, len(path) - 2)] for path in paths],
    }
    return {level: _names(ids, names) for level, ids in groups.items()}


def _names(ids: Sequence[int], names: Mapping[int, str]) -> tuple[str, ...]:
    """Return a name for each id; different ids get different names."""
    unique = sorted(set(ids))
    named = dict(zip(unique, distinct_names([names[i] for i in unique], unique), strict=True))
    return tuple(named[i] for i in ids)
