"""Whether a run and a dataset speak of the same classes."""

from __future__ import annotations

from collections.abc import Sequence

from crossx.errors import CrossXError

SHOWN = 3


def check_classes(trained: Sequence[str], found: Sequence[str], dataset: str) -> None:
    """Check that the classes of a dataset are those that a run was trained on, in the same order.

    Args:
        trained: The run's class names in label order.
        found: The dataset's class names in label order.
        dataset: The dataset's name, for the message.

    Raises:
        CrossXError: If they differ: which are missing, unknown or elsewhere in the order.
    """
    if list(trained) == list(found):
        return
    missing = _without(trained, found)
    unknown = _without(found, trained)
    if not missing and not unknown and len(trained) == len(found):
        place = next(i for i, (a, b) in enumerate(zip(trained, found, strict=True)) if a != b)
        problem = (
            f"has the run's {len(trained)} classes in another order (class {place} is {found[place]!r}, in the run "
            f"{trained[place]!r}), so labels would be mixed up"
        )
    elif not unknown:
        problem = (
            f"has only {len(found)} of the run's {len(trained)} classes (missing: {_listed(missing)}), "
            "so labels would be mixed up"
        )
    elif not missing:
        problem = f"has {len(unknown)} classes that the run was not trained on ({_listed(unknown)})"
    else:
        problem = (
            f"has other classes than the run: {len(unknown)} that the run does not know ({_listed(unknown)}), and "
            f"not {len(missing)} that it does ({_listed(missing)})"
        )
    raise CrossXError(
        f"dataset {dataset!r} {problem}: give the --data.dataset and --data.root that it was trained on."
    )


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")
