"""Suites: named variants of one training configuration, packaged as YAML or written by the user. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from crossx.errors import UsageError, nearest, unknown
from crossx.recipes import SECTIONS, YAMLLoader
from crossx.training.config import Config

_FOLDER = resources.files("crossx.ablation") / "suites"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.,_=-]*")


@dataclass(frozen=True)
class Suite:
    """What an ablation compares.

    Attributes:
        name: Its packaged name, or the stem of its file.
        title: What it asks.
        source: Figure, table or equation that it belongs to; empty where there is none.
        variants: Variant name -> section -> option -> value, what it changes. The first is the one that the others
            are held against.
    """

    name: str
    title: str
    source: str
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def configure(self, base: Config) -> dict[str, Config]:
        """Return variant name -> ``base`` with the variant's changes.

        A variant of another method than ``base`` keeps none of its method's options.

        Raises:
            UsageError: If an option is unknown or cannot work, naming the variant.
        """
        configs = {}
        for name, changes in self.variants.items():
            try:
                configs[name] = _change(base, changes)
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
            options as a recipe has them, ``title`` and ``source`` are optional.

    Raises:
        UsageError: If there is no such suite or file, or the file is no valid suite.
    """
    path = Path(name)
    if str(name) in list_suites():
        text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    elif path.suffix not in (".yaml", ".yml"):
        raise unknown("suite", str(name), [*list_suites(), "a YAML file"])
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8 text"
            raise UsageError(f"{path}: cannot be read ({reason}).") from error
    try:
        values = yaml.load(text, Loader=YAMLLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    return _build(path.stem, str(name), values)


def _build(name: str, source: str, values: Any) -> Suite:
    variants = values.get("variants") if isinstance(values, Mapping) else None
    if not isinstance(variants, Mapping) or not variants:
        raise UsageError(f"{source}: a suite has `variants`, a mapping of names to options.")
    for key in values:
        if key not in ("title", "source", "variants"):
            raise UsageError(f"{source}: unknown key {key!r}. There is: title, source, variants.")
    for variant, changes in variants.items():
        if not _NAME.fullmatch(str(variant)):
            raise UsageError(
                f"{source}: {variant!r} cannot be a variant's name, which becomes a folder: use letters, digits and "
                "+.,_=- alone."
            )
        if not isinstance(changes, Mapping) or not all(isinstance(v, Mapping) for v in changes.values()):
            raise UsageError(f"{source}: {variant} must map sections to options: model: {{num_parts: 3}}.")
        for section in changes:
            if section not in SECTIONS:
                raise UsageError(
                    f"{source}: {variant}: unknown section {section!r}.{nearest(str(section), SECTIONS)}"
                )
    return Suite(
        name,
        str(values.get("title", name)),
        str(values.get("source", "")),
        {str(variant): changes for variant, changes in variants.items()},
    )


def _change(base: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    if changes.get("model", {}).get("method", base.model.method) != base.model.method:
        base = replace(base, model=replace(base.model, options={}))
    values = base.to_dict()
    for section, options in changes.items():
        values[section] = {**values[section], **options}
    config = Config.from_dict(values)
    # imports torch
    from crossx.methods.base import check_options

    check_options(config.model.method, config.model.options)
    return config
