"""The options of ``crossx fit``: a first pass finds the method, a second one parses its options."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from crossx.cli import method_options
from crossx.cli.parser import (
    IMPORT_OPTION,
    Option,
    add_options,
    dataclass_options,
    explain,
    new_parser,
    option_helps,
    unknown_argument,
)
from crossx.data.config import DataConfig
from crossx.errors import UsageError, check_choice
from crossx.recipes import OTHERS, PRESETS, SECTIONS, Recipe, list_recipes, load_recipe
from crossx.suggestions import nearest
from crossx.training.config import (
    Config,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
    adapt_to_method,
    recipe_method,
    scale_resize,
)
from crossx.training.sections import LEFT_OUT

PROG = "crossx fit"
EXAMPLES = """\
crossx fit --preset fast --data.root my_images         # or balanced, best
crossx fit --config finetune --data.dataset folder --data.root my_images --output runs/mine
crossx fit --config crossx_cub_resnet50 --data.root CUB_200_2011 --data.batch_size 16
crossx fit --config plain_cub_resnet50 --help          # the options of another method, with its values
crossx fit --config finetune --print_config > my.yaml  # a recipe of your own
crossx fit --config runs/mine/config.yaml --init runs/mine --data.root others --output runs/others
crossx fit --resume runs/mine
crossx fit --resume runs/mine --restart                # start over, with the same options
crossx fit --resume runs/mine --trainer.max_epochs 40  # train a finished run for longer"""
LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "optim.patience")
"""The options that decide how long a run is trained."""
RESUMABLE = ("resume", "restart", "data.root", *LENGTHS)
"""The options that may be given with --resume."""
FIRST = (
    "model.method",
    "model.backbone",
    "model.pretrained",
    "data.dataset",
    "data.root",
    "data.image_size",
    "data.batch_size",
    "trainer.max_epochs",
    "optim.lr",
    "trainer.accelerator",
    "trainer.precision",
)
"""The options that most commands give; the help shows them before the sections."""
INSTEAD = {
    "early_stopping early_stop early_stopping_patience": "give --optim.patience N, which ends the training after N "
    "validations without a better one",
    "num_classes classes nc num_labels": "the classes are those of the images",
    "no_pretrained scratch from_scratch": "give --model.pretrained false",
    "local_rank rank world_size nproc_per_node": "--trainer.devices and --trainer.num_nodes start the processes",
    "no_cuda no_gpu use_cpu": "give --trainer.accelerator cpu",
    "save_best_only save_top_k": "best and last checkpoint are always written",
}
"""Options of other tools, with underscores, that are none here, and what to do instead."""


@dataclasses.dataclass(frozen=True)
class FitArguments:
    """The parsed words of ``crossx fit``.

    Attributes:
        config: The full configuration; ``config.output`` is None where the command did not give one.
        recipe: The recipe's name or file, where one was given.
        resume: The run to continue, where one was given; of ``config`` only ``data.root`` counts then.
        restart: Whether to start that run over.
        limits: The options of the training's length that were given with ``resume``, by argument of that function.
        notes: Values of the recipe that were changed without being asked for, for the user to read.
        print_config: Whether to print the configuration instead of training.
    """

    config: Config
    recipe: str | None = None
    resume: str | None = None
    restart: bool = False
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    print_config: bool = False


def parse_fit(words: Sequence[str]) -> FitArguments:
    """Parse what follows ``crossx fit``.

    Raises:
        UsageError: For an unknown option, method or recipe (with the nearest match), or a value of a wrong type.
        SystemExit: After ``--help``.
    """
    first = _first_pass(words)
    if first.resume:
        return _resume(words)
    if "--restart" in words:
        raise UsageError("--restart starts a run over: name it with --resume RUN.")
    name = _recipe_name(first)
    recipe = load_recipe(name) if name else None
    method = first.method or (recipe_method(recipe) if recipe else ModelConfig().method)
    parser = _method_parser(method)
    others, notes = _apply(recipe, parser, method) if recipe else ({}, [])
    values = _parse(parser, words, method).as_dict()
    given = {key: values[key] for key in ("init", "tuned", "seed", "output", *SECTIONS)}
    given[OTHERS] = others
    if recipe and not any(word.split("=", 1)[0] == "--data.resize_size" for word in words):
        notes += scale_resize(recipe, given["data"])
    config = Config.from_dict(given)
    if recipe and config.tuned:
        options = method_options.method_options(recipe_method(recipe))
        defaults = {option.name.removeprefix("model."): option.default for option in options}
        config = config.with_changes_noted(recipe, defaults)
    return FitArguments(
        config,
        recipe=name,
        notes=tuple(notes),
        print_config=values["print_config"],
    )


def fit_parser(words: Sequence[str]) -> jsonargparse.ArgumentParser:
    """Return the parser for the method that the words choose."""
    first = _first_pass(words)
    name = _recipe_name(first)
    recipe = load_recipe(name) if name else Recipe("")
    return _method_parser(first.method or recipe_method(recipe))


def _method_parser(method: str) -> jsonargparse.ArgumentParser:
    parser = new_parser(
        PROG,
        "Train a network. The options of the method are those of the one that --config or --model.method chooses, and "
        "every default is the value in effect.",
        EXAMPLES,
        usage=f"{PROG} [--preset NAME | --config NAME_OR_FILE] [--resume RUN] [--SECTION.OPTION VALUE ...]",
    )
    options = list(_options(method))
    first = {option.name: option for option in options if option.name in FIRST}
    rest = [option for option in options if option.name not in FIRST]
    add_options(
        parser, [dataclasses.replace(first[name], group="Options used most") for name in FIRST] + rest
    )
    for name, choices in (
        ("--config", list_recipes),
        ("--preset", lambda: [*PRESETS]),
        ("--model.method", method_options.list_methods),
    ):
        parser._option_string_actions[name].completer = lambda choices=choices, **_: choices()  # type: ignore[attr-defined]
    return parser


def _options(method: str) -> Iterator[Option]:
    text = str | None
    config = "A packaged recipe (`crossx recipes`) or a YAML file; options override its values."
    resume = (
        "Continue this run where it stopped, or train it for longer, with its own options; of the others only "
        f"{', '.join(f'--{name}' for name in RESUMABLE[1:])} may be given."
    )
    restart = "With --resume: delete what the run has learned, and start over with its options."
    output = "Run folder to create; by default the first free runs/NAME-DATASET-N."
    yield Option("config", text, None, config, "--config", "NAME_OR_FILE")
    preset = f"A packaged recipe by its purpose: {', '.join(PRESETS)} (docs/training.md); options override its values."
    yield Option("preset", text, None, preset, "--preset", "NAME")
    yield Option("resume", text, None, resume, "--resume", "RUN")
    yield Option("restart", bool, False, restart, "--restart", flag=True)
    yield Option("init", text, None, option_helps(Config)["init"], "--init", "RUN")
    yield Option("output", text, None, output, "--output", "RUN")
    yield Option("seed", int, Config().seed, option_helps(Config)["seed"], "--seed")
    print_config = "Print the configuration as YAML and exit."
    yield Option("print_config", bool, False, print_config, "--print_config", flag=True)
    yield from dataclass_options(ModelConfig, "model.", yaml=True, skip=("options",))
    others = ", ".join(name for name in method_options.list_methods() if name != method)
    for option in method_options.method_options(method):
        yield dataclasses.replace(option, group=f"Options of the method {method} (others: {others})")
    yield from dataclass_options(DataConfig, "data.", yaml=True)
    yield from dataclass_options(OptimConfig, "optim.", yaml=True)
    yield from dataclass_options(TrainerConfig, "trainer.", yaml=True)
    tuned = option_helps(Config)["tuned"]
    yield Option("tuned", text, None, tuned, "--tuned", "TEXT", group="Where the options are from")
    yield dataclasses.replace(IMPORT_OPTION, group="A method of your own")


def _first_pass(words: Sequence[str]) -> argparse.Namespace:
    # of other options the last value counts, but other tools merge several configurations
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise UsageError("--config is given twice: give one recipe, which can name another as its `base`.")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "preset", "resume", "model.method"):
        parser.add_argument(f"--{name}", dest=name.rpartition(".")[2])
    try:
        return parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError as error:
        message = str(error).removeprefix("argument ")
        raise UsageError(f"{message}; see `{PROG} --help`.") from error


def _recipe_name(first: argparse.Namespace) -> str | None:
    """Return the recipe that --config or --preset chooses, None without them."""
    if first.preset is None:
        name: str | None = first.config
        return name
    if first.config is not None:
        raise UsageError(f"--preset {first.preset} and --config {first.config}: give only one of them.")
    check_choice("preset", first.preset, PRESETS)
    return PRESETS[first.preset]


def _resume(words: Sequence[str]) -> FitArguments:
    allowed = [f"--{name}" for name in RESUMABLE]
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in allowed:
            raise UsageError(
                f"--resume continues a run with its own options (only {', '.join(allowed[1:])} may be given): "
                f"leave out {name}."
            )
    parser, method = new_parser(PROG, "", ""), ModelConfig().method
    options = [option for option in _options(method) if option.name in RESUMABLE]
    add_options(
        parser, [option if option.flag else dataclasses.replace(option, default=None) for option in options]
    )
    values = vars(_parse(parser, words, method).as_flat())
    limits = {name.rpartition(".")[2]: values[name] for name in LENGTHS if values.get(name) is not None}
    trainer = {name: value for name, value in limits.items() if name != "patience"}
    config = Config(
        data=DataConfig(root=values["data.root"]),
        trainer=TrainerConfig(**trainer),
        optim=OptimConfig(patience=limits.get("patience", 0)),
    )
    return FitArguments(config, resume=values["resume"], restart=bool(values["restart"]), limits=limits)


def _apply(
    recipe: Recipe, parser: jsonargparse.ArgumentParser, method: str
) -> tuple[dict[str, Any], list[str]]:
    """Make the recipe's values the parser's defaults; return its options of other methods, and what to note."""
    known = {action.dest for action in parser._actions}
    recipe, notes = adapt_to_method(recipe, method, _option_names)
    values = jsonargparse.Namespace()  # type: ignore[no-untyped-call]
    for key, setting in recipe.settings.items():
        name = ".".join(key)
        if name in known:
            values[name] = setting.value
        elif len(key) == 1 and (hint := nearest(name, (*SECTIONS, OTHERS))):
            raise UsageError(f"{recipe.name}: unknown section {name!r}.{hint}")
        else:
            raise UsageError(f"{recipe.name}: {_unknown_option(f'--{name}', parser, method)}")
    try:
        # set_defaults does not check types
        parser.parse_object(values)
        parser.set_defaults({**vars(values.as_flat()), "model.method": method})
    except argparse.ArgumentError as error:
        raise UsageError(f"{recipe.name}: {explain(str(error), parser)}") from error
    return recipe.to_dict().get(OTHERS, {}), notes


def _option_names(method: str) -> list[str]:
    return [option.name.removeprefix("model.") for option in method_options.method_options(method)]


def require_data(config: Config) -> None:
    """Check that the command names images to train on.

    Raises:
        UsageError: If it does not.
    """
    if config.data.root is None and config.data.dataset == DataConfig().dataset:
        raise UsageError(
            "which images? Give --data.root DIR with one folder per class, or --data.dataset NAME for another dataset "
            "(`crossx datasets list`); `crossx quickstart` draws images and trains on them."
        )


def _parse(parser: jsonargparse.ArgumentParser, words: Sequence[str], method: str) -> jsonargparse.Namespace:
    try:
        return parser.parse_args(list(words))
    except argparse.ArgumentError as error:
        _, unrecognized, rest = str(error).partition("unrecognized arguments: ")
        if unrecognized:
            raise _unknown_option(rest.split()[0], parser, method) from error
        raise explain(str(error), parser) from error


def _unknown_option(argument: str, parser: jsonargparse.ArgumentParser, method: str) -> UsageError:
    name = argument.split("=", 1)[0].removeprefix("--")
    section, _, option = name.partition(".")
    for words, instead in INSTEAD.items():
        if name.lstrip("-").replace("-", "_").lower() in words.split():
            return UsageError(f"unknown option {argument.split('=', 1)[0]!r}: {instead}.")
    if section == "trainer" and option in LEFT_OUT:
        return UsageError(f"--{name} cannot be given: {LEFT_OUT[option]}.")
    owners = [
        other
        for other in method_options.present_methods()
        if name in {item.name for item in method_options.method_options(other)}
    ]
    if section == "model" and owners:
        have = "has" if len(owners) == 1 else "have"
        return UsageError(f"method {method!r} has no option {option!r}; {', '.join(owners)} {have} it.")
    option = "--config" if Path(argument).suffix in (".yaml", ".yml") else "--data.root"
    if not argument.startswith("-") and os.path.exists(argument):
        return UsageError(f"unexpected argument {argument!r}. Did you mean '{option} {argument}'?")
    parser.prog = f"{PROG} --model.method {method}"
    return unknown_argument(argument, parser)
