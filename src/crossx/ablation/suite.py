"""Suites: named variants of one training configuration, packaged as YAML or written by the user. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from crossx.errors import UsageError, unknown
from crossx.recipes import SECTIONS
from crossx.suggestions import nearest
from crossx.training.config import Config
from crossx.yaml import load_yaml, read_yaml

Changes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The changes of a variant: section -> option -> value."""

KEYS = ("title", "source", "variants", "tune")

_FOLDER = resources.files("crossx.ablation") / "suites"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.,_=-]*")


@dataclass(frozen=True)
class Suite:
    """What an ablation compares.

    Attributes:
        name: Its packaged name, or the stem of its file.
        title: The question that it answers.
        source: The figure, table or equation that it reproduces, if any.
        variants: Variant name -> its changes. The others are compared with the first.
        tune: Variant name -> alternatives, each a further change; validation chooses one of them or none. All variants
            have the same number. Empty if nothing is tuned.
    """

    name: str
    title: str
    source: str
    variants: Mapping[str, Changes]
    tune: Mapping[str, Sequence[Changes]] = field(default_factory=dict)

    def configure(self, base: Config) -> dict[str, list[Config]]:
        """Return variant name -> ``base`` with the variant's changes, then with each of its alternatives as well.

        A variant with another method than ``base`` has the options that ``base`` has for that method, and keeps none of
        its own method.

        Raises:
            UsageError: If an option is unknown or cannot work, naming the variant.
        """
        configs = {}
        for name, changes in self.variants.items():
            try:
                config = apply_changes(base, changes)
                configs[name] = [
                    config,
                    *(apply_changes(config, further) for further in self.tune.get(name, ())),
                ]
            except UsageError as error:
                raise UsageError(f"suite {self.name}, variant {name}: {error}") from error
        return configs


def list_suites() -> list[str]:
    """Return the names of the packaged suites, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir())


def load_suite(name: str | Path) -> Suite:
    """Read a packaged suite or a YAML file.

    Args:
        name: A packaged name (see ``list_suites``) or the path of a YAML file: ``variants`` maps names to sections of
            options as in a recipe; ``title`` and ``source`` are optional.

    Raises:
        UsageError: If there is no such suite or file, or the file is no valid suite.
    """
    path = Path(name)
    if str(name) in list_suites():
        text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    elif path.suffix not in (".yaml", ".yml"):
        raise unknown("suite", str(name), [*list_suites(), "a YAML file"])
    else:
        text = read_yaml(path)
    return _build(path.stem, str(name), load_yaml(text, str(name)))


def _build(name: str, source: str, values: Any) -> Suite:
    variants = values.get("variants") if isinstance(values, Mapping) else None
    if not isinstance(variants, Mapping) or not variants:
        raise UsageError(f"{source}: a suite has `variants`, a mapping of names to options.")
    for key in values:
        if key not in KEYS:
            raise UsageError(f"{source}: unknown key {key!r}. Choose from: {', '.join(KEYS)}.")
    for variant, changes in variants.items():
        if not _NAME.fullmatch(str(variant)):
            raise UsageError(
                f"{source}: {variant!r} cannot be a variant's name, which becomes a folder: use only letters, digits "
                "and +.,_=-."
            )
        _check_changes(f"{source}: {variant}", changes)
    return Suite(
        name,
        str(values.get("title", name)),
        str(values.get("source", "")),
        {str(variant): changes for variant, changes in variants.items()},
        _read_tune(source, values.get("tune", {}), variants),
    )


def _read_tune(source: str, tune: Any, variants: Mapping[Any, Any]) -> dict[str, Sequence[Changes]]:
    """Return variant -> alternatives; ``tune`` is one list for all variants, or one per variant."""
    if not tune:
        return {}
    by_variant = tune if isinstance(tune, Mapping) else dict.fromkeys(variants, tune)
    if by_variant.keys() != variants.keys() or not all(isinstance(a, list) for a in by_variant.values()):
        raise UsageError(f"{source}: `tune` is a list of changes, or maps every variant to such a list.")
    budgets = {len(alternatives) for alternatives in by_variant.values()}
    if len(budgets) > 1:
        raise UsageError(
            f"{source}: `tune` must give every variant the same number of alternatives, not {sorted(budgets)}."
        )
    for variant, alternatives in by_variant.items():
        for number, changes in enumerate(alternatives, start=1):
            _check_changes(f"{source}: tune: {variant}, alternative {number}", changes)
    return {str(variant): alternatives for variant, alternatives in by_variant.items()}


def _check_changes(where: str, changes: Any) -> None:
    if not isinstance(changes, Mapping) or not all(isinstance(v, Mapping) for v in changes.values()):
        raise UsageError(f"{where} must map sections to options: model: {{num_parts: 3}}.")
    for section in changes:
        if section not in SECTIONS:
            raise UsageError(f"{where}: unknown section {section!r}.{nearest(str(section), SECTIONS)}")


def apply_changes(base: Config, changes: Changes) -> Config:
    """Return a configuration with changes; another method has the options of ``Config.with_method``.

    Raises:
        UsageError: If an option is unknown or cannot work.
    """
    method = changes.get("model", {}).get("method", base.model.method)
    # from_dict refuses what is no text
    values = (base.with_method(method) if isinstance(method, str) else base).to_dict()
    for section, options in changes.items():
        values[section] = {**values[section], **options}
    config = Config.from_dict(values)
    # imports torch
    from crossx.methods.registry import check_options

    check_options(config.model.method, config.model.options)
    return config
