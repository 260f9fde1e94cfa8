"""Check that a dataset has the run's classes."""

from __future__ import annotations

from collections.abc import Sequence

from crossx.data.names import class_name, quoted
from crossx.errors import CrossXError, counted, first_few

SHOWN = 3


def check_classes(trained: Sequence[str], found: Sequence[str], dataset: str) -> None:
    """Check that a dataset has the classes that a run was trained on, in the same order.

    Names are compared as text (``names.class_name``): a run may have been trained on names in another Unicode form.

    Args:
        trained: The run's class names in label order.
        found: The dataset's class names in label order.
        dataset: The dataset's name, for the message.

    Raises:
        CrossXError: If they differ, with the missing, unknown or misplaced classes.
    """
    trained, found = ([class_name(name) for name in names] for names in (trained, found))
    if trained == found:
        return
    shown = dict(zip(names := [*trained, *found], quoted(names), strict=True))

    def listed(several: Sequence[str]) -> str:
        return first_few([shown[name] for name in several], SHOWN)

    trained_set, found_set = set(trained), set(found)
    missing = [name for name in trained if name not in found_set]
    unknown = [name for name in found if name not in trained_set]
    if missing and unknown:
        problem = (
            f"has other classes than the run: {len(unknown)} that the run does not know ({listed(unknown)}), and "
            f"not {len(missing)} that it does ({listed(missing)})"
        )
    elif unknown:
        problem = f"has {counted(len(unknown), 'class')} that the run was not trained on ({listed(unknown)})"
    elif missing or len(trained) != len(found):
        problem = (
            f"has only {len(found)} of the run's {len(trained)} classes (missing: {listed(missing)}), "
            "so labels would be mixed up"
        )
    else:
        index = next(i for i, name in enumerate(trained) if name != found[i])
        problem = (
            f"has the run's {len(trained)} classes in another order (class {index} is {shown[found[index]]}, in the "
            f"run {shown[trained[index]]}), so labels would be mixed up"
        )
    raise CrossXError(
        f"dataset {dataset!r} {problem}: give the --data.dataset and --data.root that it was trained on."
    )
