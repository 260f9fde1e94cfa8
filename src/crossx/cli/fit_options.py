"""The options of ``crossx fit``, found in two passes: first the method, then the options that it has.

The second pass offers the fields of the config dataclasses and the chosen method's own options beside
``--model.method``, each typed and described by its docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jsonargparse

from crossx.cli.options import VerbParser, epilog, unknown_argument
from crossx.cli.typed_options import (
    HelpFormatter,
    Option,
    add_option,
    dataclass_options,
    describe,
    first_line,
    keyword_options,
    literals,
    option_helps,
)
from crossx.data.config import DataConfig
from crossx.errors import UsageError, nearest
from crossx.recipes import SECTIONS, Recipe, load_recipe
from crossx.training.config import LEFT_OUT, Config, ModelConfig, OptimConfig, TrainerConfig

PROG = "crossx fit"
EXAMPLES = (
    "crossx fit --config finetune --data.dataset folder --data.root my_images --output runs/mine",
    "crossx fit --config crossx_cub_resnet50 --data.root CUB_200_2011 --data.batch_size 16",
    "crossx fit --config plain_cub_resnet50 --help        # the options of another method, with its values",
    "crossx fit --resume runs/mine",
)


@dataclasses.dataclass(frozen=True)
class FitArguments:
    """What ``crossx fit`` was asked for.

    Attributes:
        config: The full configuration; ``config.output`` is None where the command did not give one.
        recipe: The recipe's name or file, where one was given.
        resume: The run to continue, where one was given; of ``config`` only ``data.root`` counts then.
        notes: What a recipe's values were changed to beyond what was asked for, for the user to read.
    """

    config: Config
    recipe: str | None = None
    resume: str | None = None
    notes: tuple[str, ...] = ()


def parse_fit(arguments: Sequence[str]) -> FitArguments:
    """Parse what follows ``crossx fit``.

    Raises:
        UsageError: For an unknown option, method or recipe (with the nearest match), or a value of a wrong type.
        SystemExit: After ``--help``.
    """
    first = _first_pass(arguments)
    if first.resume:
        return _resume(first.resume, first.root, arguments)
    recipe = load_recipe(first.config) if first.config else None
    method = first.method or _method(recipe)
    parser = build_parser(method)
    notes = _apply(recipe, parser, method) if recipe else []
    values = _parse(parser, arguments, method).as_dict()
    given = {key: values[key] for key in ("seed", "output", "model", "data", "optim", "trainer")}
    if recipe:
        notes += _scale_resize(recipe, given["data"], arguments)
    return FitArguments(Config.from_dict(given), recipe=first.config, notes=tuple(notes))


def build_parser(method: str) -> jsonargparse.ArgumentParser:
    """Return the parser of the second pass.

    Raises:
        UsageError: If there is no such method.
    """
    from crossx.methods import list_methods, method_class

    cls = method_class(method)
    parser = jsonargparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--config NAME_OR_FILE] [--resume RUN] [--SECTION.OPTION VALUE ...]",
        description="Train a network. The options below are those of the method that --config or --model.method "
        "chooses, with the values in effect.",
        epilog=epilog(EXAMPLES),
        formatter_class=HelpFormatter,
        exit_on_error=False,
        print_config=None,
        allow_abbrev=False,
    )
    for option in (
        Option(
            "config",
            str | None,
            None,
            "A packaged recipe (`crossx recipes`) or a YAML file; later options win.",
        ),
        Option(
            "resume",
            str | None,
            None,
            "Continue this run where it stopped, with its own options (--data.root apart).",
        ),
        Option(
            "output", str | None, None, "Run folder to make; left out, the first free runs/NAME-DATASET-N."
        ),
        Option("seed", int, Config().seed, option_helps(Config)["seed"]),
    ):
        add_option(parser, option)
    _add_group(parser, first_line(ModelConfig), dataclass_options(ModelConfig, "model", skip=("options",)))
    others = ", ".join(name for name in list_methods() if name != method)
    own = list(keyword_options(cls.__init__, cls, "model"))
    _add_group(parser, f"Options of the method {method} (others: {others})", own)
    _add_group(parser, first_line(DataConfig), dataclass_options(DataConfig, "data"))
    _add_group(parser, first_line(OptimConfig), dataclass_options(OptimConfig, "optim"))
    _add_group(parser, first_line(TrainerConfig), dataclass_options(TrainerConfig, "trainer"))
    return parser


def _first_pass(arguments: Sequence[str]) -> argparse.Namespace:
    parser = VerbParser("fit", add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("--model.method", dest="method")
    parser.add_argument("--data.root", dest="root")
    return parser.parse_known_args(arguments)[0]


def _resume(run: str, root: str | None, arguments: Sequence[str]) -> FitArguments:
    for word in arguments:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in ("--resume", "--data.root"):
            raise UsageError(
                f"--resume continues a run with its own options (--data.root apart): leave out {name}."
            )
    return FitArguments(Config(data=DataConfig(root=root)), resume=run)


def _method(recipe: Recipe | None) -> str:
    default = ModelConfig().method
    return str(recipe.get("model", "method", default=default)) if recipe else default


def _apply(recipe: Recipe, parser: jsonargparse.ArgumentParser, method: str) -> list[str]:
    """Make the recipe's values the parser's defaults; note the options that another method left over."""
    known = {action.dest for action in parser._actions}
    dropped = []
    values = jsonargparse.Namespace()  # type: ignore[no-untyped-call]
    for key, setting in recipe.settings.items():
        name = ".".join(key)
        if name in known:
            values[name] = setting.value
        elif key[0] == "model" and method != _method(recipe):
            dropped.append(name)
        elif len(key) == 1 and (hint := nearest(name, SECTIONS)):
            raise UsageError(f"{recipe.name}: unknown section {name!r}.{hint}")
        else:
            raise UsageError(f"{recipe.name}: {_unknown_option(f'--{name}', parser, method)}")
    try:
        # set_defaults alone takes any value
        parser.parse_object(values)
        parser.set_defaults({**vars(values.as_flat()), "model.method": method})
    except argparse.ArgumentError as error:
        raise UsageError(f"{recipe.name}: {_readable(str(error), parser)}") from error
    return [f"method {method} has no {', '.join(dropped)}: left out of {recipe.name}."] if dropped else []


def _scale_resize(recipe: Recipe, data: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Keep a recipe's proportion of resized image to crop where the command line changes the crop alone.

    A crop of 160 pixels out of the recipe's 600 would show the network a tenth of each image.
    """
    crop, resized = recipe.get("data", "image_size"), recipe.get("data", "resize_size")
    asked = any(word.split("=", 1)[0] == "--data.resize_size" for word in arguments)
    if not (crop and resized) or asked or data["image_size"] == crop:
        return []
    data["resize_size"] = round(resized * data["image_size"] / crop)
    return [
        f"data.resize_size is {data['resize_size']}, in the proportion of {recipe.name} ({resized} to {crop})."
    ]


def _parse(
    parser: jsonargparse.ArgumentParser, arguments: Sequence[str], method: str
) -> jsonargparse.Namespace:
    try:
        return parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        message = str(error)
        _, unrecognized, rest = message.partition("unrecognized arguments: ")
        if unrecognized:
            raise _unknown_option(rest.split()[0], parser, method) from error
        raise UsageError(_readable(message, parser)) from error


def _unknown_option(argument: str, parser: jsonargparse.ArgumentParser, method: str) -> UsageError:
    from crossx.methods import list_methods, method_options

    name = argument.split("=", 1)[0].removeprefix("--")
    section, _, option = name.partition(".")
    if section == "trainer" and option in LEFT_OUT:
        return UsageError(f"--{name} cannot be given: {LEFT_OUT[option]}.")
    owners = [other for other in list_methods() if option in method_options(other)]
    if section == "model" and owners:
        have = "has" if len(owners) == 1 else "have"
        return UsageError(f"method {method!r} has no option {option!r}; {', '.join(owners)} {have} it.")
    return unknown_argument(argument, parser._option_string_actions, f"{PROG} --model.method {method}")


def _readable(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Say in one line what a value should have been."""
    match = re.match(r'Parser key "([\w.]+)":', message)
    if not match:
        return f"{' '.join(message.removeprefix('argument ').split())}; see `{PROG} --help`."
    name = match[1]
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    value = given[1] if given else "this"
    action = next(action for action in parser._actions if action.dest == name)
    hint = getattr(action, "_typehint", action.type)
    names = [str(item) for item in literals(hint)]
    return f"--{name} takes {describe(hint)}, not {value!r}.{nearest(value, names)}"


def _add_group(parser: jsonargparse.ArgumentParser, title: str, options: Iterable[Option]) -> None:
    group = parser.add_argument_group(title)
    for option in options:
        add_option(group, option)
