"""The options of a training run. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crossx.data.config import DataConfig
from crossx.errors import UsageError, unknown
from crossx.recipes import OTHERS, SECTIONS, Recipe, is_method_option, load_recipe, tuned_then_changed
from crossx.runs import read_config
from crossx.training.sections import (
    ModelConfig,
    OptimConfig,
    TrainerConfig,
    build_section,
    build_trainer,
    require_mapping,
)
from crossx.yaml import dump_yaml

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainerConfig",
    "adapt_to_method",
    "recipe_method",
    "scale_resize",
]

FITTED = "probe"
"""The method whose head is fitted before the first step, so that it needs no epoch; not with ``head: sgd``."""
FROM_RECIPE = 'Config.from_recipe("finetune", data={"root": DIR}, output=RUN) makes one'
"""What to do where something else than a ``Config`` is given."""

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Everything a training run depends on.

    Attributes:
        model: The network and the method.
        data: The images.
        optim: Optimiser, schedule and regularisation.
        trainer: Devices, length, logging and checkpoints.
        init: Start from the weights of this run (its folder or a checkpoint in it) or shared model (its folder or
            USER/NAME on the Hub) instead of `model.pretrained`: every layer that fits is taken.
        tuned: How the options were chosen, as `crossx tune` writes it into best.yaml; results and report repeat it.
            Options that a recipe, the command or Python changes afterwards are added.
        seed: Seed of the initialisation, the order of images and everything random in training.
        output: The run folder to create; by default `runs/METHOD-DATASET-BACKBONE-sSEED`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    init: str | None = None
    tuned: str | None = None
    other_methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.trainer, Mapping):
            self.trainer = build_trainer(self.trainer)
        self.validate()

    def validate(self) -> None:
        """Check what needs neither torch, data nor model.

        Raises:
            UsageError: If an option cannot work, naming it and what to do.
        """
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be in [0, 2**32), not {self.seed}.")
        if self.trainer.max_epochs == 0 and not (self.fits_its_head or self.optim.fit_heads):
            raise UsageError(
                "trainer.max_epochs must be at least 1, not 0, unless the heads are fitted before the first step "
                "(method probe, optim.fit_heads)."
            )
        if self.init is not None and self.model.backbone_weights is not None:
            raise UsageError(
                "init and model.backbone_weights both say what the backbone starts from: leave one of them out."
            )

    @property
    def fits_its_head(self) -> bool:
        """Whether the method itself fits its head before the first step."""
        return self.model.method == FITTED and self.model.options.get("head") != "sgd"

    def run_path(self) -> Path:
        """Return the run folder: ``output``, or the default name."""
        if self.output is not None:
            return Path(self.output)
        backbone = self.model.backbone.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
        return Path("runs") / f"{self.model.method}-{self.data.dataset}-{backbone}-s{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that ``from_dict`` reads; the method's options are flat under ``model``."""
        values = {**asdict(self), "model": self.model.to_dict()}
        return values if self.other_methods else {key: values[key] for key in values if key != OTHERS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from a dictionary; missing options take their defaults.

        Raises:
            UsageError: For an unknown option (with the nearest name) or an invalid value.
        """
        readers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "model": ModelConfig.from_dict,
            "data": lambda section: build_section(DataConfig, section, "data."),
            "optim": lambda section: build_section(OptimConfig, section, "optim."),
            "trainer": build_trainer,
            OTHERS: lambda section: {
                method: dict(require_mapping(f"{OTHERS}.{method}", options))
                for method, options in section.items()
            },
        }
        parsed = {
            key: readers[key](require_mapping(key, value)) if key in readers else value
            for key, value in values.items()
        }
        return build_section(cls, parsed, "")

    @classmethod
    def from_recipe(cls, name: str | Path, **overrides: Any) -> Config:
        """Load a packaged recipe or a YAML file, with some options changed.

        ::

            Config.from_recipe("finetune", data={"root": "my_images"}, output="runs/mine")

        Args:
            name: See ``crossx.recipes.load_recipe``.
            **overrides: Top-level options, or sections (``model``, ``data``, ``optim``, ``trainer``) whose options
                replace the recipe's. As on the command line, the options of the recipe's method are left out for
                another method, and ``resize_size`` keeps its proportion to ``image_size``; the log says so.

        Raises:
            UsageError: If there is no such recipe, or as ``from_dict``.
        """
        recipe = original = load_recipe(name)
        model, data = (overrides.get(section) or {} for section in ("model", "data"))
        method = str(model.get("method", recipe_method(recipe)))
        recipe, notes = adapt_to_method(recipe, method, _method_options)
        values = recipe.to_dict()
        for key, value in overrides.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, Mapping) else value
        if "image_size" in data and "resize_size" not in data:
            notes += scale_resize(recipe, values["data"])
        for note in notes:
            log.info(note)
        return cls.from_dict(values).with_changes_noted(original)

    def with_method(self, method: str) -> Config:
        """Return this configuration with another method: see ``crossx.recipes.Recipe.with_method``."""
        if method == self.model.method:
            return self
        others = {**self.other_methods, self.model.method: self.model.options}
        options = dict(others.pop(method, {}))
        return replace(self, model=replace(self.model, method=method, options=options), other_methods=others)

    def with_changes_noted(self, recipe: Recipe, defaults: Mapping[str, Any] | None = None) -> Config:
        """Return this configuration, whose note on a search names the options that differ from those of its recipe.

        Args:
            recipe: Where this configuration is from.
            defaults: Values of the method's options that the recipe may have left out.
        """
        if self.tuned is None or self.tuned != recipe.get("tuned"):
            return self
        before, after = Config.from_dict(recipe.to_dict()).to_dict(), self.to_dict()
        before["model"] = {**(defaults or {}), **before["model"]}
        changed = [
            f"{section}.{option}"
            for section in SECTIONS
            for option in {**before[section], **after[section]}
            # as JSON, in which a tuple is a list
            if json.dumps(before[section].get(option)) != json.dumps(after[section].get(option))
        ]
        return replace(self, tuned=tuned_then_changed(self.tuned, changed))

    def to_yaml(self) -> str:
        """Return the configuration as YAML, in the order of the fields."""
        return dump_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, path: str | Path) -> Config:
        """Read a file in the format of ``to_yaml``.

        Raises:
            CrossXError: If the file is missing or is not a YAML mapping.
            UsageError: As ``from_dict``.
        """
        values = read_config(Path(path))
        try:
            return cls.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


def recipe_method(recipe: Recipe) -> str:
    """Return the method that a recipe trains."""
    return str(recipe.get("model", "method", default=ModelConfig().method))


def adapt_to_method(
    recipe: Recipe, method: str, options_of: Callable[[str], Collection[str]]
) -> tuple[Recipe, list[str]]:
    """Give a recipe another method, see ``Recipe.with_method``; keep options that only the new method has.

    Args:
        recipe: A recipe.
        method: The method to train instead.
        options_of: Returns the names of the options of a method, or raises ``UsageError`` for an unknown one.

    Returns:
        The recipe, and notes of what was left out, and of options of methods that are not known.

    Raises:
        UsageError: If a method does not have an option that the recipe gives for it.
    """
    own = recipe_method(recipe)
    given = {key: setting for key, setting in recipe.settings.items() if is_method_option(key)}
    notes = []
    for other in recipe.others:
        # a note, since the method may be of a package that is not imported
        try:
            have = options_of(other)
        except UsageError as error:
            notes.append(f"{recipe.name}: {OTHERS}: {error}")
            continue
        for _, option in recipe.others[other]:
            if option not in have:
                raise UsageError(f"{recipe.name}: for the method {other}: {unknown('option', option, have)}")
    if method == own or not (given or recipe.others):
        return recipe.with_method(method), notes
    known = options_of(method)
    try:
        theirs = options_of(own) if ("model", "method") in recipe.settings else ()
    except UsageError:
        # of a package that is not imported
        theirs = [key[1] for key in given]
    meant = {key: setting for key, setting in given.items() if key[1] in known and key[1] not in theirs}
    changed = recipe.with_method(method)
    # a recipe without a method has kept all of them
    kept = {key: s for key, s in changed.settings.items() if s is not given.get(key)}
    settings = {**kept, **meant}
    names = ", ".join(".".join(key) for key in given if key not in settings)
    if names:
        notes.append(f"method {method}: {names} left out of {recipe.name}, whose method is {own}.")
    return replace(changed, settings=settings), notes


def _method_options(method: str) -> Collection[str]:
    # imports torch
    from crossx.methods import method_options

    return method_options(method)


def scale_resize(recipe: Recipe, data: dict[str, Any]) -> list[str]:
    """Keep a recipe's ratio of resized image to crop in ``data``, where only the crop was changed; return a note.

    A crop of 160 pixels out of the recipe's 600 would show the network a tenth of each image.
    """
    crop, resized = recipe.get("data", "image_size"), recipe.get("data", "resize_size")
    if not (crop and resized) or data["image_size"] == crop:
        return []
    data["resize_size"] = round(resized * data["image_size"] / crop)
    return [
        f"data.resize_size is {data['resize_size']}, in the proportion of {recipe.name} ({resized} to {crop})."
    ]
