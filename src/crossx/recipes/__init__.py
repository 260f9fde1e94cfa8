"""Packaged recipes: training configurations as YAML, each number with its source in a comment. Imports no torch.

A recipe holds the sections of ``crossx fit`` (``model``, ``data``, ``optim``, ``trainer``) and top-level options
(``seed``, ``output``). ``base: NAME`` or ``base: [NAME, ...]`` takes the values of other recipes first, left to
right, and what the recipe itself says overrides them; a file of one's own can name a packaged recipe as its base.
Files whose name starts with an underscore are parts that only serve as a base.

What a recipe trains has a name as timm's models have one, ``architecture.tag``, which stands for the recipe wherever
its own name does: ``crossx_resnet50.cub_448`` is ``crossx_cub_resnet50``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from crossx.errors import CrossXError, UsageError, nearest

SECTIONS = ("model", "data", "optim", "trainer")
RELEASED = "_released"
"""How the names of the recipes end that follow the released code and not the paper."""

Key: TypeAlias = tuple[str, ...]
"""``("seed",)`` or ``("optim", "lr")``."""


@dataclass(frozen=True)
class Setting:
    """One value of a recipe and the comments that say where it comes from.

    Attributes:
        value: Plain YAML value.
        above: Comment lines before it, without ``#``.
        beside: Comment at the end of its line, without ``#``; empty where there is none.
    """

    value: Any
    above: tuple[str, ...] = ()
    beside: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything of its bases filled in.

    Attributes:
        name: Its packaged name or the path of its file.
        description: One line on what it trains.
        bases: The recipes that it builds on, as it names them.
        settings: Every setting, in the order of reading.
    """

    name: str
    description: str = ""
    bases: tuple[str, ...] = ()
    settings: Mapping[Key, Setting] = field(default_factory=dict)

    def get(self, *key: str, default: Any = None) -> Any:
        """Return one value: ``recipe.get("optim", "lr")``."""
        return self.settings[key].value if key in self.settings else default

    def to_dict(self) -> dict[str, Any]:
        """Return section -> option -> value, the form of ``config.yaml``."""
        values: dict[str, Any] = {}
        for key, setting in self.settings.items():
            target = values
            for part in key[:-1]:
                target = target.setdefault(part, {})
            target[key[-1]] = setting.value
        return values

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, comments included; ``load_recipe`` reads it back."""
        lines = [f"description: {_scalar(self.description)}"] if self.description else []
        for section in (None, *SECTIONS):
            members = {
                key: setting
                for key, setting in self.settings.items()
                if (key[0] if len(key) > 1 else None) == section
            }
            if members and section:
                lines += ["", f"{section}:"]
            for key, setting in members.items():
                indent = "  " if section else ""
                lines += [f"{indent}# {comment}" for comment in setting.above]
                beside = f"  # {setting.beside}" if setting.beside else ""
                lines.append(f"{indent}{key[-1]}: {_scalar(setting.value)}{beside}")
        return "\n".join(lines) + "\n"


def list_recipes() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    return [name for name in _packaged() if not name.startswith("_")]


def architecture(method: str, backbone: str, options: Mapping[str, Any]) -> str:
    """Return the timm-style name of a network: ``crossx_resnet50``; the backbone's weight tag is left out.

    The special cases of ``kernel_pooling`` are published methods, and have their names: ``bilinear_resnet50``.
    """
    named = options.get("pooling") if method == "kernel_pooling" else None
    return f"{method if named in (None, 'kernel') else named}_{backbone.partition('.')[0]}"


def model_name(method: str, backbone: str, options: Mapping[str, Any], dataset: str, image_size: int) -> str:
    """Return the timm-style name of a trained network: ``crossx_resnet50.cub_448``.

    Args:
        method: A registered method.
        backbone: A timm name.
        options: The method's.
        dataset: Name of the dataset.
        image_size: Side of the crop that the network sees, in pixels.
    """
    return f"{architecture(method, backbone, options)}.{dataset}_{image_size}"


@cache
def model_names() -> Mapping[str, str]:
    """Return model name -> packaged recipe that trains it, sorted by recipe."""
    return {_model_name(load_recipe(name)): name for name in list_recipes()}


def _model_name(recipe: Recipe) -> str:
    name = model_name(
        recipe.get("model", "method"),
        recipe.get("model", "backbone"),
        recipe.to_dict()["model"],
        recipe.get("data", "dataset"),
        recipe.get("data", "image_size"),
    )
    return name + RELEASED if recipe.name.endswith(RELEASED) else name


def load_recipe(name: str | Path) -> Recipe:
    """Read a packaged recipe or a YAML file and fill in its bases.

    Args:
        name: A packaged name (see ``list_recipes``), its model name (see ``model_names``) or the path of a YAML file.

    Raises:
        UsageError: If there is no such recipe or file, or the file is no valid recipe.
    """
    return _resolve(str(name), ())


def _resolve(name: str, parents: tuple[str, ...]) -> Recipe:
    if name in parents:
        raise UsageError(f"recipe {parents[-1]!r}: its base {name!r} is based on it in turn.")
    try:
        recipe = _parse(name, _read(name))
    except UsageError as error:
        if not parents:
            raise
        raise UsageError(f"{parents[-1]}: base: {error}") from error
    settings: dict[Key, Setting] = {}
    for base in recipe.bases:
        settings |= _resolve(base, (*parents, name)).settings
    return Recipe(name, recipe.description, recipe.bases, settings | dict(recipe.settings))


def _packaged() -> list[str]:
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read(name: str) -> str:
    if name in _packaged():
        return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if name in model_names():
            return _read(model_names()[name])
        hint = nearest(name, [*list_recipes(), *model_names()])
        raise UsageError(f"unknown recipe {name!r}.{hint} `crossx recipes` lists them; a file ends in .yaml.")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; `crossx recipes` lists the packaged recipes.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CrossXError(f"{path}: cannot be read ({reason}).") from error


class YAMLLoader(yaml.SafeLoader):
    """PyYAML reads ``1e-4`` as a string (YAML 1.1); as a number here, as in YAML 1.2."""


YAMLLoader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YAMLLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(name: str, text: str) -> Recipe:
    loader = YAMLLoader(text)
    try:
        root = loader.get_single_node()
        entries = list(_entries(loader, root, name)) if root is not None else []
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{name}: line {line} is not valid YAML ({error.problem}).") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML ({' '.join(str(error).split())}).") from error
    finally:
        loader.dispose()
    lines = text.split("\n")
    settings = {
        key: Setting(value, _comments_above(lines, key_node), _comment_beside(lines, key_node, value_node))
        for key, value, key_node, value_node in entries
    }
    description = settings.pop(("description",), Setting("")).value
    base = settings.pop(("base",), Setting(())).value
    return Recipe(name, str(description), (base,) if isinstance(base, str) else tuple(base or ()), settings)


def _entries(
    loader: YAMLLoader, root: yaml.Node, name: str
) -> Iterator[tuple[Key, Any, yaml.Node, yaml.Node]]:
    for key_node, value_node in _members(loader, root, name):
        key = str(key_node.value)
        value = loader.construct_document(value_node)
        if key not in SECTIONS:
            yield (key,), value, key_node, value_node
        elif value is not None:
            for option_node, option_value in _members(loader, value_node, f"{name}: {key}"):
                option = (key, str(option_node.value))
                yield option, loader.construct_document(option_value), option_node, option_value


def _members(loader: YAMLLoader, node: yaml.Node, where: str) -> list[tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{where}: line {node.start_mark.line + 1} is not a mapping of options to values.")
    loader.flatten_mapping(node)
    seen = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            raise UsageError(f"{where}: line {key_node.start_mark.line + 1} gives {key_node.value!r} again.")
        seen.add(key_node.value)
    return list(node.value)


def _comments_above(lines: list[str], key: yaml.Node) -> tuple[str, ...]:
    above: list[str] = []
    for line in reversed(lines[: key.start_mark.line]):
        if not line.startswith(" " * key.start_mark.column + "#"):
            break
        above.append(line.strip().removeprefix("#").removeprefix(" "))
    return tuple(reversed(above))


def _comment_beside(lines: list[str], key: yaml.Node, value: yaml.Node) -> str:
    block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    mark = key.end_mark if block else value.end_mark
    _, found, comment = (
        lines[mark.line][mark.column :].partition("#") if mark.line < len(lines) else ("", "", "")
    )
    return comment.strip() if found else ""


def _scalar(value: Any) -> str:
    """Write a value on one line, lists and mappings in flow style."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("...\n").removesuffix("\n")
