"""Search spaces: which options of a configuration are searched, and their values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from crossx.ablation.suite import Changes, apply_changes
from crossx.errors import UsageError, first_line
from crossx.recipes import SECTIONS
from crossx.suggestions import nearest
from crossx.training.config import Config
from crossx.yaml import dump_yaml, load_yaml, read_yaml

RANGE = ("low", "high", "log", "step")
DIGITS = 3
"""Significant digits of a drawn number, or of its range or step if that is smaller."""
MAX_CHOICES = 100

FIXED = {
    **dict.fromkeys(
        (
            "dataset", "root", "level", "num_classes", "images_per_class", "test_images_per_class", "seed",
            "image_column", "label_column", "val_fraction", "test_fraction", "split_seed", "train_on", "bad_images",
            "exclude",
        ),
        "it decides on which images the trials are compared",
    ),
    **dict.fromkeys(
        ("selection", "limit_val_batches", "overfit_batches", "check_val_every_n_epoch"),
        "it decides how the trials are compared",
    ),
    **dict.fromkeys(
        ("max_steps", "max_time", "devices", "num_nodes", "accelerator", "logger", "strategy"),
        "give it as an option for all trials",
    ),
    "method": "tune each method by itself, or compare them with `crossx ablate`",
}  # fmt: skip
"""Options that are not searched, and why."""
_CHECKED = ("data.image_size", "optim.mixup", "optim.cutmix", "trainer.max_epochs")
"""Options of which each value is tried on the network and the data, next to those of ``model``."""


@dataclass(frozen=True)
class Choices:
    """Values to choose from, all different."""

    values: Sequence[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", list(self.values))

    @property
    def ends(self) -> Sequence[Any]:
        """All values, to be checked before the search."""
        return self.values

    def describe(self) -> Any:
        """Return the choices as YAML gives them."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, which belong to it.

    Attributes:
        low: The smallest.
        high: The largest.
        whole: Whether they are whole numbers.
        log: Whether they are drawn uniformly in their logarithm.
        step: Distance of neighbours; None for any number, or 1 for whole ones.
    """

    low: float
    high: float
    whole: bool
    log: bool = False
    step: float | None = None

    @property
    def ends(self) -> Sequence[Any]:
        """The bounds, to be checked before the search."""
        return self.low, self.high

    def describe(self) -> Any:
        """Return the range as YAML gives it."""
        values = {"low": self.low, "high": self.high, "log": self.log or None, "step": self.step}
        return {name: value for name, value in values.items() if value is not None}

    def rounded(self, value: float) -> float:
        """Return a drawn number with few digits, within the bounds."""
        if self.whole or not value:
            return value
        # near 1, as of a moving average, the digits of the range count
        finest = self.step or min(abs(value), self.high - self.low)
        decimals = DIGITS - 1 - math.floor(math.log10(finest))
        return min(max(round(value, decimals), self.low), self.high)


@dataclass(frozen=True)
class Space:
    """The options that are searched.

    Attributes:
        options: ``section.option`` -> its values.
        source: The file, or what the default is for.
    """

    options: Mapping[str, Choices | Range]
    source: str

    def describe(self) -> dict[str, Any]:
        """Return option -> values, in the format of a file."""
        return {name: values.describe() for name, values in self.options.items()}

    def check(self, base: Config) -> list[Config]:
        """Check each value alone; return the configurations that have another network, images or length than ``base``.

        Raises:
            UsageError: If a value cannot work, naming the option.
        """
        others = []
        for name, values in self.options.items():
            for value in values.ends:
                try:
                    _check_type(name, value, base)
                    config = apply_changes(base, changes_of({name: value}))
                except UsageError as error:
                    raise UsageError(f"{self.source}: {name}: {error}") from error
                if name.startswith("model.") or name in _CHECKED:
                    others.append(config)
        return others

    def values_of(self, config: Config) -> dict[str, Any] | None:
        """Return the values that a configuration has now; None if one is not in the space."""
        now = {name: _present(config, name) for name in self.options}
        for name, values in self.options.items():
            if isinstance(values, Choices) and now[name] not in values.values:
                return None
            if isinstance(values, Range):
                if not isinstance(now[name], int | float) or not values.low <= now[name] <= values.high:
                    return None
                if values.step and not math.isclose(
                    math.remainder(now[name] - values.low, values.step), 0, abs_tol=1e-9
                ):
                    return None
        return now

    def combinations(self) -> list[dict[str, Any]] | None:
        """Return all combinations of the values; None if there is a range."""
        choices = [values.values for values in self.options.values() if isinstance(values, Choices)]
        if len(choices) < len(self.options):
            return None
        return [dict(zip(self.options, values, strict=True)) for values in itertools.product(*choices)]


def read_space(path: Path, base: Config) -> Space:
    """Read a YAML file: ``section.option`` (or nested sections) -> choices, or a range ``{low, high, log, step}``.

    ``{times: [0.5, 1, 2]}``, or ``times`` with a range, are multiples of the value in ``base``.

    Raises:
        UsageError: If the file is missing or no space, or an option is unknown or not searched.
    """
    values = load_yaml(read_yaml(path), str(path))
    if not isinstance(values, Mapping) or not values:
        raise UsageError(
            f"{path}: a space maps options to values, such as optim.lr: {{low: 1e-4, high: 1e-2, log: true}}."
        )
    flat: dict[str, Any] = {}
    for key, entry in values.items():
        members = entry.items() if key in SECTIONS and isinstance(entry, Mapping) else ((None, entry),)
        for option, value in members:
            name = str(key) if option is None else f"{key}.{option}"
            if name in flat:
                raise UsageError(f"{path}: {name} is given twice.")
            flat[name] = value
    return Space({name: _parse(str(path), name, entry, base) for name, entry in flat.items()}, str(path))


def default_space(base: Config) -> Space:
    """Return the packaged space for the method of a configuration, centred on its values.

    Raises:
        UsageError: If it has nothing to search, as for a method that takes no steps.
    """
    method = base.model.method
    source = f"the default space of method {method}"
    text = (resources.files("crossx.tuning") / "spaces.yaml").read_text(encoding="utf-8")
    packaged = load_yaml(text, "spaces.yaml")
    entries = packaged["training"] if base.trainer.max_epochs else {}
    entries = {**entries, **packaged["methods"].get(method, {})}
    options = {}
    for name, entry in entries.items():
        values = _parse(source, name, _with_present(entry, name, base), base, default=True)
        if values is not None:
            options[name] = values
    if not options:
        raise UsageError(f"{source} has nothing to search with this configuration: give --space FILE.yaml.")
    return Space(options, source)


def changes_of(values: Mapping[str, Any]) -> Changes:
    """Return ``section.option`` -> value as section -> option -> value."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, option = name.partition(".")
        changes.setdefault(section, {})[option] = value
    return changes


def shown(value: Any) -> str:
    """Return a value on one line, as YAML gives it."""
    return dump_yaml(value, flow=True).strip()


def short(value: object) -> str:
    """Return a value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else shown(value)


def _with_present(entry: Any, name: str, base: Config) -> Any:
    """Add the present value to a packaged list, so that the space has the unchanged configuration."""
    now = _present(base, name)
    return [now, *entry] if isinstance(entry, list) and now not in entry else entry


def _parse(source: str, name: str, entry: Any, base: Config, *, default: bool = False) -> Any:
    """Return the values of an option; with ``default`` None if there are no two different ones."""
    section, _, option = name.partition(".")
    if section not in SECTIONS or not option:
        hint = nearest(section, SECTIONS) if option else ""
        raise UsageError(f"{source}: {name!r} is not an option of a section, such as optim.lr.{hint}")
    known = [*_hints(section, base)]
    if option not in known:
        raise UsageError(f"{source}: unknown option {name}.{nearest(option, known)}")
    if option in FIXED:
        raise UsageError(f"{source}: {name} is not searched: {FIXED[option]}.")
    if isinstance(entry, Mapping) and "times" in entry:
        if len(entry) > 1:
            raise UsageError(f"{source}: {name}: `times` is given alone: {{times: [0.5, 1, 2]}}.")
        entry = _multiplied(source, name, entry["times"], _present(base, name), default)
    if isinstance(entry, list):
        different = [value for number, value in enumerate(entry) if value not in entry[:number]]
        if default and len(different) < 2:
            return None
        if len(different) < 2 or len(different) > MAX_CHOICES:
            raise UsageError(
                f"{source}: {name}: give 2 to {MAX_CHOICES} different values to choose from, not {len(different)}."
            )
        return Choices(different)
    if entry is None and default:
        return None
    if not isinstance(entry, Mapping):
        raise UsageError(
            f"{source}: {name} takes a list of values, or a range such as {{low: 1, high: 4}}, not {shown(entry)}."
        )
    return _range(source, name, entry, whole=_hints(section, base)[option] is int)


def _range(source: str, name: str, entry: Mapping[str, Any], *, whole: bool) -> Range:
    for key in entry:
        if key not in RANGE:
            raise UsageError(
                f"{source}: {name}: unknown key {key!r}.{nearest(str(key), RANGE)} A range has: {', '.join(RANGE)}."
            )
    if "low" not in entry or "high" not in entry:
        raise UsageError(f"{source}: {name}: a range needs low and high.")
    log, step = entry.get("log", False), entry.get("step")
    numbers = [entry["low"], entry["high"], *([step] if step is not None else [])]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UsageError(f"{source}: {name}: low, high and step are numbers, not {shown(number)}.")
        if whole and number != int(number):
            raise UsageError(f"{source}: {name}: takes whole numbers, not {number}.")
    if not isinstance(log, bool):
        raise UsageError(f"{source}: {name}: log is true or false, not {shown(log)}.")
    low, high = (int(end) if whole else float(end) for end in numbers[:2])
    if not low < high:
        raise UsageError(f"{source}: {name}: low {low:g} must be below high {high:g}.")
    if log and (low <= 0 or step is not None):
        raise UsageError(f"{source}: {name}: log needs low above 0, and no step.")
    if step is not None and not 0 < step <= high - low:
        raise UsageError(f"{source}: {name}: step {step:g} must be above 0 and fit between low and high.")
    if step is not None:
        step = int(step) if whole else float(step)
        # the largest value that is drawn
        high = low + step * math.floor((high - low) / step + 1e-9)
    return Range(low, high, whole, log, step)


def _multiplied(source: str, name: str, factors: Any, now: Any, default: bool) -> Any:
    """Return choices or a range, multiples of the present value; with ``default`` None if that is 0."""
    numbers = now if isinstance(now, list) else [now]
    plain = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    if not plain or not any(numbers):
        if default:
            return None
        raise UsageError(
            f"{source}: {name}: `times` needs a number other than 0 in the configuration, not {shown(now)}."
        )
    ends = isinstance(factors, Mapping)
    given = [factors.get("low"), factors.get("high")] if isinstance(factors, Mapping) else factors
    if not isinstance(given, list) or not all(isinstance(factor, int | float) for factor in given):
        raise UsageError(f"{source}: {name}: `times` takes a list of factors, or a range of them.")
    if ends and isinstance(now, list):
        raise UsageError(f"{source}: {name} is a list, of which `times` takes a list of factors.")
    scaled = [_times(now, factor) for factor in given]
    return {**factors, "low": scaled[0], "high": scaled[1]} if ends else scaled


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [_times(number, factor) for number in value]
    # 0.3 * 0.1 is 0.03, not 0.030000000000000002
    return value if factor == 1 else float(f"{value * factor:.6g}")


def _present(config: Config, name: str) -> Any:
    section, _, option = name.partition(".")
    values = config.to_dict()[section]
    if option in values:
        value = values[option]
    else:
        # imports torch
        from crossx.methods.registry import method_options

        value = method_options(config.model.method).get(option)
    return list(value) if isinstance(value, tuple) else value


def _hints(section: str, config: Config) -> dict[str, Any]:
    """Return the options of a section, with the type of each."""
    hints = get_type_hints(type(getattr(config, section)))
    if section == "model":
        # imports torch
        from crossx.methods.registry import option_types

        del hints["options"]
        hints |= {name: hint for name, (hint, _) in option_types(config.model.method).items()}
    return hints


def _check_type(name: str, value: Any, base: Config) -> None:
    section, _, option = name.partition(".")
    try:
        TypeAdapter(_hints(section, base)[option]).validate_python(value, strict=not isinstance(value, list))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(f"cannot be {shown(value)} ({first_line(ValueError(reason))}).") from error
