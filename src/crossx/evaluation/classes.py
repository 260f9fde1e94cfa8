"""Check that a dataset has the run's classes."""

from __future__ import annotations

from collections.abc import Sequence

from crossx.errors import CrossXError, first_few

SHOWN = 3


def check_classes(trained: Sequence[str], found: Sequence[str], dataset: str) -> None:
    """Check that a dataset has the classes that a run was trained on, in the same order.

    Args:
        trained: The run's class names in label order.
        found: The dataset's class names in label order.
        dataset: The dataset's name, for the message.

    Raises:
        CrossXError: If they differ, with the missing, unknown or misplaced classes.
    """
    if list(trained) == list(found):
        return
    trained_set, found_set = set(trained), set(found)
    missing = [name for name in trained if name not in found_set]
    unknown = [name for name in found if name not in trained_set]
    if missing and unknown:
        problem = (
            f"has other classes than the run: {len(unknown)} that the run does not know ({_list(unknown)}), and "
            f"not {len(missing)} that it does ({_list(missing)})"
        )
    elif unknown:
        problem = f"has {len(unknown)} classes that the run was not trained on ({_list(unknown)})"
    elif missing or len(trained) != len(found):
        problem = (
            f"has only {len(found)} of the run's {len(trained)} classes (missing: {_list(missing)}), "
            "so labels would be mixed up"
        )
    else:
        index = next(i for i, name in enumerate(trained) if name != found[i])
        problem = (
            f"has the run's {len(trained)} classes in another order (class {index} is {found[index]!r}, in the run "
            f"{trained[index]!r}), so labels would be mixed up"
        )
    raise CrossXError(
        f"dataset {dataset!r} {problem}: give the --data.dataset and --data.root that it was trained on."
    )


def _list(names: Sequence[str]) -> str:
    return first_few([repr(name) for name in names], SHOWN)
