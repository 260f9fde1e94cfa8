"""Packaged recipes: training configurations as YAML, each number with its source in a comment. Imports no torch.

A recipe has the sections of ``crossx fit`` (``model``, ``data``, ``optim``, ``trainer``) and top-level options
(``seed``, ``output``). ``base: NAME`` or ``base: [NAME, ...]`` takes the values of other recipes first, left to right;
the recipe's own values override them. Your own file can name a packaged recipe as its base. Files whose name starts
with an underscore serve only as a base.

``other_methods: {NAME: {option: value}}`` are options of the method NAME, which apply if it is chosen instead of the
recipe's. A recipe with another method than its base has the base's options of the method there.

The model that a recipe trains has a timm-style name, ``architecture.tag``, which can be used instead of the recipe's:
``crossx_resnet50.cub_448`` is ``crossx_cub_resnet50``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from crossx.errors import UsageError
from crossx.suggestions import nearest
from crossx.yaml import compose_yaml, dump_yaml, load_yaml, read_yaml

SECTIONS = ("model", "data", "optim", "trainer")
NETWORK = ("method", "backbone", "pretrained", "backbone_weights", "backbone_args")
"""Keys of ``model`` that are no options of the method. A recipe with another method than its bases takes only these."""
PRESETS = {"fast": "finetune_fast", "balanced": "finetune_balanced", "best": "finetune_best"}
"""Preset -> the recipe that it stands for; presets are names of recipes everywhere."""
RELEASED = "_released"
"""Suffix of the recipes that follow the released code instead of the paper."""

NEUTRAL = (
    "data.root",
    "data.num_workers",
    "data.cache",
    "data.cache_folder",
    "data.eval_batch_size",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.profile",
    "trainer.checkpoint_every_n_steps",
    "trainer.checkpoint_every_n_minutes",
)
"""Options that two trainings with the same result may have different: paths, and options that change only the speed."""

Key: TypeAlias = tuple[str, ...]
"""``("seed",)`` or ``("optim", "lr")``."""

OTHERS = "other_methods"

_METHOD: Key = ("model", "method")
_TUNED: Key = ("tuned",)


@dataclass(frozen=True)
class Setting:
    """One value of a recipe and the comments that give its source.

    Attributes:
        value: Plain YAML value.
        above: Comment lines before it, without ``#``.
        beside: Comment at the end of its line, without ``#``; empty if there is none.
    """

    value: Any
    above: tuple[str, ...] = ()
    beside: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe, with the values of its bases filled in.

    Attributes:
        name: Its packaged name or the path of its file.
        description: One line on what it trains.
        bases: The recipes that it builds on, as it names them.
        settings: Every setting, in the order of reading.
        others: Other method -> its options, which apply if that method is chosen instead.
        published_as: The published name of its network, where that is not the method's.
    """

    name: str
    description: str = ""
    bases: tuple[str, ...] = ()
    settings: Mapping[Key, Setting] = field(default_factory=dict)
    others: Mapping[str, Mapping[Key, Setting]] = field(default_factory=dict)
    published_as: str = ""

    def get(self, *key: str, default: Any = None) -> Any:
        """Return one value: ``recipe.get("optim", "lr")``."""
        return deepcopy(self.settings[key].value) if key in self.settings else default

    def with_method(self, method: str) -> Recipe:
        """Return the recipe with another method: with the options for that method, without those of its own.

        The options left out are in ``others``, so that the way back restores them. A recipe without a method keeps its
        options, which are those of whichever method is chosen.
        """
        settings, others = dict(self.settings), dict(self.others)
        own = self.get(*_METHOD)
        if own is not None and str(own) != method:
            options = {key: setting for key, setting in settings.items() if is_method_option(key)}
            settings = {key: setting for key, setting in settings.items() if key not in options}
            if options:
                others[str(own)] = options
            settings[_METHOD] = Setting(method)
        found = others.pop(method, {})
        settings |= {key: setting for key, setting in found.items() if key not in settings}
        return replace(self, settings=settings, others=others)

    def to_dict(self) -> dict[str, Any]:
        """Return section -> option -> value, the form of ``config.yaml``."""
        values: dict[str, Any] = {}
        for (*section, option), setting in self.settings.items():
            (values.setdefault(section[0], {}) if section else values)[option] = deepcopy(setting.value)
        if self.others:
            values[OTHERS] = {
                method: {key[-1]: deepcopy(setting.value) for key, setting in options.items()}
                for method, options in self.others.items()
            }
        return values

    def to_yaml(self) -> str:
        """Return the recipe with its bases filled in as YAML with comments; ``load_recipe`` reads it back."""
        text = dump_yaml({"description": self.description}) if self.description else ""
        for section in (None, *SECTIONS):
            members = {
                key: setting
                for key, setting in self.settings.items()
                if (key[0] if len(key) > 1 else None) == section
            }
            if members and section:
                text += f"\n{section}:\n"
            text += _member_lines(members, "  " if section else "")
        if self.others:
            text += f"\n# options of other methods, where one is chosen instead\n{OTHERS}:\n"
        for method, options in self.others.items():
            text += f"  {_flow(method)}:\n{_member_lines(options, '    ')}"
        return text or "\n"


def _member_lines(members: Mapping[Key, Setting], indent: str) -> str:
    text = ""
    for key, setting in members.items():
        text += "".join(f"{indent}# {comment}\n" for comment in setting.above)
        beside = f"  # {setting.beside}" if setting.beside else ""
        # the name too: `no` would be a boolean
        text += f"{indent}{_flow(key[-1])}: {_flow(setting.value)}{beside}\n"
    return text


def _flow(value: Any) -> str:
    return dump_yaml(value, flow=True).strip()


def is_method_option(key: Key) -> bool:
    """Whether a setting is an option of the method: under ``model``, and none of ``NETWORK``."""
    return key[0] == "model" and len(key) > 1 and key[1] not in NETWORK


def list_recipes() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    return [name for name in _packaged() if not name.startswith("_")]


def architecture(network: str, backbone: str) -> str:
    """Return the timm-style name of an architecture, without the backbone's weight tag: ``crossx_resnet50``."""
    return f"{network}_{backbone.partition('.')[0]}"


def model_name(network: str, backbone: str, dataset: str, image_size: int) -> str:
    """Return the timm-style name of a trained network: ``crossx_resnet50.cub_448``.

    Args:
        network: Name of a method, or the name under which it was published with its options.
        backbone: A timm name.
        dataset: Name of the dataset.
        image_size: Side of the crop that the network sees, in pixels.
    """
    return f"{architecture(network, backbone)}.{dataset}_{image_size}"


@cache
def model_names() -> Mapping[str, str]:
    """Return model name -> packaged recipe that trains it, sorted by recipe."""
    return {_model_name(load_recipe(name)): name for name in list_recipes()}


def _model_name(recipe: Recipe) -> str:
    name = model_name(
        recipe.published_as or recipe.get("model", "method"),
        recipe.get("model", "backbone"),
        recipe.get("data", "dataset"),
        recipe.get("data", "image_size"),
    )
    return name + RELEASED if recipe.name.endswith(RELEASED) else name


def load_recipe(name: str | Path) -> Recipe:
    """Read a packaged recipe or a YAML file and fill in its bases.

    Args:
        name: A packaged name (see ``list_recipes``), its model name (see ``model_names``), a preset (see ``PRESETS``)
            or the path of a YAML file.

    Raises:
        UsageError: If there is no such recipe or file, or the file is no valid recipe.
    """
    return _resolve(str(name), ())


def tuned_then_changed(tuned: str, changed: Sequence[str]) -> str:
    """Return the note of a search on its best options, with those that were changed afterwards."""
    changed = [option for option in changed if option not in NEUTRAL]
    return f"{tuned}; changed afterwards: {', '.join(changed)}" if changed else tuned


def _resolve(name: str, parents: tuple[str, ...]) -> Recipe:
    if name in parents:
        raise UsageError(f"recipe {parents[-1]!r}: its base {name!r} is based on it in turn.")
    try:
        recipe = _load(name)
    except UsageError as error:
        if not parents:
            raise
        raise UsageError(f"{parents[-1]}: base: {error}") from error
    bases = Recipe("")
    for base in recipe.bases:
        bases = _merge(bases, _resolve(base, (*parents, name)))
    merged = _merge(bases, recipe)
    settings = dict(merged.settings)
    if isinstance(tuned := merged.get("tuned"), str) and _TUNED not in recipe.settings:
        before = _for_method_of(recipe, bases).settings
        changed = [
            ".".join(key)
            for key, setting in recipe.settings.items()
            if key[0] in SECTIONS and (key not in before or before[key].value != setting.value)
        ]
        settings[_TUNED] = Setting(tuned_then_changed(tuned, changed))
    return replace(recipe, name=name, settings=settings, others=merged.others)


def _merge(below: Recipe, above: Recipe) -> Recipe:
    """Return the settings of two recipes, of which the second takes precedence."""
    below = _for_method_of(above, below)
    others = {
        method: {**below.others.get(method, {}), **above.others.get(method, {})}
        for method in {**below.others, **above.others}
    }
    trained = above.get(*_METHOD, default=below.get(*_METHOD))
    # a file may give options of the method that its base trains as those of another one
    own = others.pop(str(trained), {})
    return replace(above, settings={**below.settings, **own, **above.settings}, others=others)


def _for_method_of(recipe: Recipe, base: Recipe) -> Recipe:
    method = recipe.get(*_METHOD)
    return base if method is None else base.with_method(str(method))


@cache
def _packaged() -> list[str]:
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


@cache
def _load_packaged(name: str) -> Recipe:
    return _parse(name, resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def _load(name: str) -> Recipe:
    name = PRESETS.get(name, name)
    if name in _packaged():
        return _load_packaged(name)
    path = Path(name)
    # unlike Path.is_file, false for names that no file can have
    if path.suffix not in (".yaml", ".yml") and not os.path.isfile(path):
        if name in model_names():
            return _load_packaged(model_names()[name])
        hint = nearest(name, [*list_recipes(), *PRESETS, *model_names()])
        raise UsageError(f"unknown recipe {name!r}.{hint} `crossx recipes` lists them; a file ends in .yaml.")
    return _parse(name, read_yaml(path, "; `crossx recipes` lists the packaged recipes"))


def _parse(name: str, text: str) -> Recipe:
    settings: dict[Key, Setting] = {}
    others: dict[str, Mapping[Key, Setting]] = {}
    values, root = load_yaml(text, name), compose_yaml(text)
    for key, setting, node in _read_members(values, root, text, name) if root is not None else ():
        if key == OTHERS:
            others = _read_others(setting.value, node, text, f"{name}: {key}")
        elif key not in SECTIONS:
            settings[key,] = setting
        elif setting.value is not None:
            members = _read_members(setting.value, node, text, f"{name}: {key}")
            settings |= {(key, option): member for option, member, _ in members}
    top = {key: settings.pop((key,), Setting(None)).value for key in ("description", "base", "published_as")}
    bases = top["base"] if isinstance(top["base"], list) else [top["base"]] if top["base"] else []
    if not all(isinstance(base, str) for base in bases):
        raise UsageError(f"{name}: base must be the name of a recipe, or a list of names.")
    published_as = str(top["published_as"] or "")
    return Recipe(name, str(top["description"] or ""), tuple(bases), settings, others, published_as)


def _read_others(values: Any, node: Any, text: str, where: str) -> dict[str, Mapping[Key, Setting]]:
    others: dict[str, Mapping[Key, Setting]] = {}
    if values is None:
        return others
    for method, options, found in _read_members(values, node, text, where):
        members = _read_members(options.value, found, text, f"{where}: {method}")
        others[method] = {("model", option): member for option, member, _ in members}
        if fixed := [option for _, option in others[method] if option in NETWORK]:
            raise UsageError(f"{where}: {method}: {fixed[0]} is no option of a method: give it under model.")
    return others


def _read_members(values: Any, node: Any, text: str, where: str) -> Iterator[tuple[str, Setting, Any]]:
    """Yield each key of a mapping, its value with comments, and the value's YAML node."""
    if not isinstance(values, Mapping) or node.id != "mapping":
        raise UsageError(f"{where}: line {node.start_mark.line + 1} is not a mapping of options to values.")
    lines, nodes = text.split("\n"), _member_nodes(node)
    for key, value in values.items():
        # numbers may be written in several ways, but no option is called so
        found = nodes.get(str(key))
        comments = (_comments_above(lines, found[0]), _comment_beside(lines, *found)) if found else ()
        yield str(key), Setting(value, *comments), found[1] if found else node


def _member_nodes(mapping: Any) -> dict[str, tuple[Any, Any]]:
    """Return key -> the nodes of key and value, with those that ``<<`` merges in."""
    own: dict[str, tuple[Any, Any]] = {}
    merged: dict[str, tuple[Any, Any]] = {}
    for key, value in mapping.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for other in value.value if value.id == "sequence" else [value]:
                merged = _member_nodes(other) | merged
        else:
            own[str(key.value)] = key, value
    return merged | own


def _comments_above(lines: list[str], key: Any) -> tuple[str, ...]:
    above: list[str] = []
    for line in reversed(lines[: key.start_mark.line]):
        if not line.startswith(" " * key.start_mark.column + "#"):
            break
        above.insert(0, line.strip().removeprefix("#").removeprefix(" "))
    return tuple(above)


def _comment_beside(lines: list[str], key: Any, value: Any) -> str:
    is_block = value.id != "scalar" and not value.flow_style
    mark = key.end_mark if is_block else value.end_mark
    line = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    return line.partition("#")[2].strip()
